"""A tiny wheel with text files, and its entry in the table of packages, for tests of fetching."""

import base64
import hashlib
import zipfile

from kvpress_eval.data.packages import Member, Package

NAME, VERSION, WHEEL = "tiny-texts", "1.2", "tiny_texts-1.2-py3-none-any.whl"
CONTENT = {"tiny_texts/one.json": b'{"a": 1}', "tiny_texts/two.txt": b"two\n", "tiny_texts/more/x.json": b"[]"}


def digest(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder, content=None, name=WHEEL):
    """A wheel that pip accepts; returns its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "tiny_texts-1.2.dist-info"
    files = {
        **(CONTENT if content is None else content),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for path, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return digest((folder / name).read_bytes())


def package(sha256, members=None):
    one = Member("tiny_texts/one.json", "set/one.json", "MIT", digest(CONTENT["tiny_texts/one.json"]), 8)
    more = Member("tiny_texts/more/", "set/more/", "public domain")
    return Package(NAME, VERSION, WHEEL, sha256, (one, more) if members is None else members)
