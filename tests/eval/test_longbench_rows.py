"""Where LongBench's rows come from: archives, folders and the hub; what is wrong with them is named."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from longbench_support import row, samples, write

from kvpress.errors import InputError
from kvpress_eval.data import Data
from kvpress_eval.data.longbench import fetch_longbench, fetch_longbench_v2
from kvpress_eval.tasks import TASKS, Request
from kvpress_eval.tasks.longbench import rows


@pytest.fixture(autouse=True)
def no_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPRESS_DATA", str(tmp_path / "none"))


@pytest.mark.parametrize("place", ["longbench/data.zip", "data.zip"])
def test_the_hubs_archive_is_read_without_unpacking(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/qasper.jsonl", json.dumps(row("qasper")) + "\n" + json.dumps(row("qasper", 1)))
        archive.writestr("data/qasper_e.jsonl", json.dumps(row("qasper")))
    assert len(samples(tmp_path, "longbench/qasper")) == 2
    assert len(samples(tmp_path, "longbench-e/qasper_e")) == 1
    with pytest.raises(InputError, match=r"no data/lcc\.jsonl"):
        samples(tmp_path, "longbench/lcc")


@pytest.mark.parametrize("place", ["longbench/lcc.jsonl", "longbench/data/lcc.jsonl", "lcc.jsonl", "data/lcc.jsonl"])
def test_a_folder_with_the_official_names_will_do_and_its_digest_is_noted(place: str, tmp_path: Path) -> None:
    write(tmp_path / place, row("lcc"))
    data = Data([tmp_path])
    assert len(list(TASKS["longbench/lcc"].samples(Request(None, data)))) == 1  # type: ignore[arg-type]
    assert data.used == {place: hashlib.sha256((tmp_path / place).read_bytes()).hexdigest()}


def test_missing_data_names_the_command_that_gets_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"longbench/lcc\.jsonl is missing .*kvpress data fetch longbench"):
        samples(tmp_path, "longbench/lcc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": "Paris"}, "field answers"),
        ({"answers": []}, "field answers"),
        ({"answers": [3]}, r"field answers\.0"),
        ({"context": None}, "field context"),
        ({"length": "long"}, "field length"),
        ({"length": -1}, "field length"),
        ({"all_classes": "Date"}, "field all_classes"),
        ({"_id": ""}, "field _id"),
        ({"dataset": "standin_qasper"}, "must not be reported as LongBench"),
    ],
)
def test_wrong_rows_are_named_with_file_line_and_field(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "qasper.jsonl", row("qasper"), row("qasper") | changes)
    with pytest.raises(InputError, match=rf"qasper\.jsonl' line 2 .*{message}"):
        samples(tmp_path, "longbench/qasper")


@pytest.mark.parametrize(
    "field", ["input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"]
)
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    content = row("qasper")
    del content[field]
    write(tmp_path / "qasper.jsonl", content)
    with pytest.raises(InputError, match=f"line 1 is no row of LongBench .field {field}"):
        samples(tmp_path, "longbench/qasper")


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff\xfe", b'{"a": ' * 5000, b"null"])
def test_lines_that_are_no_objects(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match="line 1 is no row of LongBench"):
        samples(tmp_path, "longbench/qasper")


def test_a_classification_row_without_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "trec.jsonl", row("trec", all_classes=None))
    with pytest.raises(InputError, match="all_classes"):
        samples(tmp_path, "longbench/trec")


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2000)
    monkeypatch.setattr(rows, "MAX_FILE_BYTES", 10_000)
    write(tmp_path / "qasper.jsonl", row("qasper"), row("qasper", 1, context="x" * 3000))
    with pytest.raises(InputError, match="line 2 is longer than 2,000 bytes"):
        samples(tmp_path, "longbench/qasper")
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/lcc.jsonl", b" " * 10_001)
    with pytest.raises(InputError, match="larger than 10,000 bytes"):
        samples(tmp_path, "longbench/lcc")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="cannot be unpacked"):
        samples(tmp_path, "longbench/lcc")


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/lcc.jsonl", json.dumps(row("lcc")))
    content = (tmp_path / "data.zip").read_bytes()
    (tmp_path / "data.zip").write_bytes(content.replace(b"braces", b"bracez", 1))
    with pytest.raises(InputError, match="cannot be unpacked"):
        samples(tmp_path, "longbench/lcc")


def test_fetching_puts_the_archive_where_the_task_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, *, repo_type: str, local_dir: Path) -> str:
        asked.append((repository, name, repo_type))
        if name == "data.zip":
            with zipfile.ZipFile(local_dir / name, "w") as archive:
                archive.writestr("data/narrativeqa.jsonl", json.dumps(row("narrativeqa")))
        else:
            (local_dir / name).write_text("[]")
        return str(local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch_longbench(tmp_path) == [tmp_path / "longbench" / "data.zip"]
    assert len(samples(tmp_path, "longbench/narrativeqa")) == 1
    assert fetch_longbench_v2(tmp_path) == [tmp_path / "longbench-v2" / "data.json"]
    assert samples(tmp_path, "longbench-v2") == []
    fetch_longbench(tmp_path)
    assert asked == [("THUDM/LongBench", "data.zip", "dataset"), ("THUDM/LongBench-v2", "data.json", "dataset")]


def test_fetching_without_a_network_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match=r"cannot be had from the hub \(ConnectionError\): copy it to .*data\.zip"):
        fetch_longbench(tmp_path)


def test_fetching_refuses_what_is_no_archive_of_longbench(tmp_path: Path) -> None:
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench" / "data.zip").write_bytes(b"<html>")
    with pytest.raises(InputError, match="not LongBench's archive"):
        fetch_longbench(tmp_path)
