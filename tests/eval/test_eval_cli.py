"""`kvpress eval` as a user runs it: a real process, killed for real, resumed; several workers; mistakes in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from longbench_support import write_trees

from kvpress.cli import main
from kvpress_eval.records import read_run

N_ROWS = 10


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_folder):
    """A folder with a small LongBench file, and a sweep over it with the tiny model."""
    folder = tmp_path_factory.mktemp("cli")
    write_trees(folder, N_ROWS)
    (folder / "trees.yaml").write_text(
        f"model: {model_folder}\ntasks: [{{task: longbench/multifieldqa_en}}]\ncontracts: [snapkv, streaming_llm]\n"
        f"budgets: [40%]\ndtype: float32\ndata: ['{folder}']\n"
    )
    return folder


def start(*arguments):
    command = [sys.executable, "-m", "kvpress", "eval", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "KVPRESS_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for_lines(path, n):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if path.is_file() and path.read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.005)
    pytest.fail(f"{path} never had {n} lines")


def timeless(folder):
    return [record.model_dump_json(exclude={"seconds"}) for record in read_run(folder)]


@pytest.fixture(scope="module")
def unbroken(workplace):
    code, _, err = finish("run", workplace / "trees.yaml", "--out", workplace / "whole")
    assert code == 0, err
    return timeless(workplace / "whole")


def test_a_killed_process_resumes_to_the_same_records(workplace, unbroken):
    folder = workplace / "killed"
    process = start("run", workplace / "trees.yaml", "--out", folder)
    for n in (4, 13, 22):
        wait_for_lines(folder / "records.jsonl", n)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = start("resume", folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert timeless(folder) == unbroken
    assert len((folder / "records.jsonl").read_text().splitlines()) == len(unbroken) == 3 * N_ROWS


def test_two_workers_make_the_same_records(workplace, unbroken):
    folder = workplace / "workers"
    code, _, err = finish("run", workplace / "trees.yaml", "--out", folder, "--workers", 2)
    assert code == 0, err
    assert timeless(folder) == unbroken
    assert all((folder / f"records-{i}of2.jsonl").stat().st_size for i in (1, 2))


def test_a_worker_that_dies_ends_the_run_with_a_sentence_and_nothing_is_lost(workplace, unbroken):
    folder = workplace / "dying"
    process = start("run", workplace / "trees.yaml", "--out", folder, "--workers", 2)
    wait_for_lines(folder / "records-2of2.jsonl", 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "2/2"], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "worker 2 was killed (SIGKILL): resume the run" in err
    assert "Traceback" not in err
    code, _, err = finish("resume", folder)
    assert code == 0, err
    assert timeless(folder) == unbroken


def here(monkeypatch, capsys, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["kvpress", "eval", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


def test_report_reads_the_run(workplace, unbroken, monkeypatch, capsys):
    code, out, err = here(monkeypatch, capsys, "report", workplace / "whole", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = [row for row in found["rows"] if row["task"] == "longbench/multifieldqa_en"]
    assert {row["arm"] for row in rows} == {"full", "snapkv@40%", "streaming_llm@40%"}
    for row in rows:
        assert row["n"] == N_ROWS
        assert {"score", "delta", "ci_low", "ci_high", "kept_bytes"} <= row.keys()
    assert found["macro"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("longbench/multifieldqa_en", "longbench/qasper"), "qasper"),
        (("longbench/multifieldqa_en", "longbench/qaspr"), "did you mean"),
        (("snapkv", "snapvk"), "did you mean 'snapkv'"),
        (("40%", "4%"), "budget"),
        (("model: ", "model: /nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_told_in_one_sentence(workplace, tmp_path, monkeypatch, capsys, change, sentence):
    path = tmp_path / "wrong.yaml"
    path.write_text((workplace / "trees.yaml").read_text().replace(*change))
    code, out, err = here(monkeypatch, capsys, "run", path, "--out", tmp_path / "run")
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err
    assert out == ""


def test_list_shows_what_there_is(monkeypatch, capsys):
    code, out, _ = here(monkeypatch, capsys, "list", "--json")
    assert code == 0
    found = json.loads(out)
    families = {task["family"] for task in found["tasks"]}
    assert {
        "ruler-2024",
        "ruler-2026",
        "ruler-posfix",
        "longbench",
        "longbench-e",
        "longbench-v2",
        "standin",
    } <= families
    assert {"needlebench-v2", "needlebench-v2-fixed", "needlebench-recipe"} <= families
    assert all(task["description"] for task in found["tasks"])
    assert "ruler-2k" in found["sweeps"]
