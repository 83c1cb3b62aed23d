"""Runs on a real Ray cluster of several worker processes: the records are those of a local run, whatever is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest
from longbench_support import write_trees

from kvpress.cli import main
from kvpress.errors import InputError
from kvpress_eval.ray import driver
from kvpress_eval.ray.board import Board, Place
from kvpress_eval.ray.cluster import Share, connected, import_ray, unreachable
from kvpress_eval.ray.driver import RayRun, Sums, run_on_ray, token
from kvpress_eval.ray.shard import Job, run_shard, wait_for_file
from kvpress_eval.records import RecordFile, read_run
from kvpress_eval.runner import Runner
from kvpress_eval.sweep import load_sweep
from kvpress_eval.units import Shard

N_ROWS, N_ARMS = 12, 3


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="ray is not installed: pip install 'kvpress-engine[ray]'")


@pytest.fixture(scope="module")
def cluster(ray):
    """A cluster of three CPUs on this machine, to which this process is connected."""
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=80_000_000,
            _temp_dir=place,
        )
        yield ray
        ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_folder):
    """A folder with a small LongBench file, and a sweep over it; its model is named from the folder, as users do."""
    folder = tmp_path_factory.mktemp("ray")
    write_trees(folder, N_ROWS)
    (folder / "model").symlink_to(model_folder)
    (folder / "trees.yaml").write_text(
        "model: model\ntasks: [{task: longbench/multifieldqa_en}]\ncontracts: [snapkv, streaming_llm]\n"
        "budgets: [40%]\ndtype: float32\ndata: ['.']\n"
    )
    return folder


@pytest.fixture(autouse=True)
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


@pytest.fixture(scope="module")
def unbroken(workplace):
    """The run of one process, without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        Runner.begin(load_sweep("trees.yaml"), workplace / "whole", "cpu").run()
    return workplace / "whole"


def timeless(folder):
    return [record.model_dump_json(exclude={"seconds"}) for record in read_run(folder)]


def check_same_records(folder, unbroken):
    """Equal apart from the clock, and each once over all files."""
    assert timeless(folder) == timeless(unbroken)
    lines = [line for path in folder.glob("records*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == N_ROWS * N_ARMS
    assert not [path for path in folder.iterdir() if path.name.startswith(".shared-")]


def here(monkeypatch, capsys, *arguments):
    """The command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["kvpress", "eval", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code, *capsys.readouterr()


def begun(folder, unbroken, n_lines=0):
    """A run that has stopped after so many records."""
    folder.mkdir()
    shutil.copy(unbroken / "manifest.json", folder)
    lines = (unbroken / "records.jsonl").read_text().splitlines(keepends=True)
    (folder / "records.jsonl").write_text("".join(lines[:n_lines]))
    return folder


def writer_of(path):
    """Pid of the process that holds the lock of a file."""
    for line in Path("/proc/locks").read_text().splitlines():
        parts = line.split()
        if "FLOCK" in parts and parts[-3].rpartition(":")[2] == str(path.stat().st_ino):
            return int(parts[-4])
    return None


@pytest.mark.slow
def test_three_shards_make_the_records_of_a_local_run(cluster, unbroken, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    code, out, err = here(
        monkeypatch, capsys, "run", "trees.yaml", "--out", folder, "--ray", "auto", "--shards", 3, "--json-progress"
    )
    assert code == 0, err
    check_same_records(folder, unbroken)
    assert sorted(path.name for path in folder.glob("records*")) == [f"records-{i}of3.jsonl" for i in (1, 2, 3)]
    assert all(path.stat().st_size for path in folder.glob("records*"))
    lines = [json.loads(line) for line in out.splitlines()]
    last = {"task": "longbench/multifieldqa_en", "mode": "query_aware", "done": N_ROWS, "total": N_ROWS}
    assert lines[-1] == last
    with pytest.raises(InputError, match="holds a run already"):
        run_on_ray(folder, load_sweep("trees.yaml"), "auto")


def test_a_killed_worker_costs_nothing(cluster, unbroken, tmp_path, capsys):
    folder, found = tmp_path / "run", {}
    path = folder / "records-2of3.jsonl"

    def kill():
        until = time.monotonic() + 120
        while time.monotonic() < until and "pid" not in found:
            if path.is_file() and path.read_bytes().count(b"\n") >= 2:
                found["pid"] = writer_of(path)
                os.kill(found["pid"], signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    run_on_ray(folder, load_sweep("trees.yaml"), "auto", 3)
    killer.join()
    assert found["pid"] not in (None, os.getpid())
    captured = capsys.readouterr()
    assert "shard 2 of 3 has lost its worker" in captured.err
    assert captured.out == ""
    check_same_records(folder, unbroken)


def test_a_run_goes_on_with_another_number_of_shards_and_of_threads(cluster, unbroken, tmp_path):
    folder = begun(tmp_path / "run", unbroken, 2 * N_ARMS + 1)
    run_on_ray(folder, None, "auto", 2)
    check_same_records(folder, unbroken)
    assert (folder / "records.jsonl").read_text().count("\n") == 2 * N_ARMS + 1
    # of three CPUs, shards of two take one at a time, and there is nothing left to do
    run_on_ray(folder, None, "auto", None, Share(cpus=2))
    check_same_records(folder, unbroken)
    devices = [one["device"] for one in json.loads((folder / "manifest.json").read_text())["software"]]
    assert any("2 threads" in device for device in devices)


def test_a_shard_waits_for_a_writer_that_only_seemed_lost(cluster, unbroken, tmp_path):
    folder = begun(tmp_path / "run", unbroken)
    other = RecordFile(folder / "records-2of2.jsonl")

    def end():
        until = time.monotonic() + 120
        while time.monotonic() < until and not (folder / "records-1of2.jsonl").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        sizes.append((folder / "records-2of2.jsonl").stat().st_size)
        other.close()

    sizes = []
    ending = threading.Thread(target=end)
    ending.start()
    run_on_ray(folder, None, "auto", 2)
    ending.join()
    assert sizes == [0]
    check_same_records(folder, unbroken)


def test_waiting_for_a_file_ends_when_it_is_free_or_with_its_sentence(tmp_path):
    path = tmp_path / "records-1of2.jsonl"
    other = RecordFile(path)
    with pytest.raises(InputError, match="another process writes to"):
        wait_for_file(path, patience=0.05, pauses=(0.01, 0.02))
    threading.Timer(0.1, other.close).start()
    wait_for_file(path, patience=60, pauses=(0.01, 0.02))
    RecordFile(path).close()


def stand_in(cluster, monkeypatch, tmp_path, task, retries=3, n_shards=1):
    """A run with another task."""
    monkeypatch.setattr(driver, "run_shard", task)
    job = Job(tmp_path, None, "token", "cpu", 1)
    return RayRun(job, n_shards, Share(0, 1), lambda *args: None, retries)


def test_a_shard_that_loses_every_worker_ends_the_run(cluster, monkeypatch, tmp_path, capsys):
    def dies(job, shard, board):
        import os
        import time

        from kvpress_eval.ray.board import Place

        board.begin.remote(shard.i, Place("there", 7))
        time.sleep(0.5)
        os.kill(os.getpid(), 9)

    with pytest.raises(InputError, match="shard 1 of 1 has lost its worker on 'there' 2 times"):
        stand_in(cluster, monkeypatch, tmp_path, dies, retries=1).run()
    assert capsys.readouterr().err.count("it goes on with another") == 1


def test_the_other_shards_of_a_mistake_are_ended(cluster, monkeypatch, tmp_path):
    def one_of_two_fails(job, shard, board):
        import os
        import time

        from kvpress.errors import InputError

        note = job.folder / "pid"
        if shard.i == 2:
            note.write_text(str(os.getpid()))
            time.sleep(600)
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        raise InputError("this is wrong")

    with pytest.raises(InputError, match=r"^this is wrong$"):
        stand_in(cluster, monkeypatch, tmp_path, one_of_two_fails, n_shards=2).run()
    assert ends(int((tmp_path / "pid").read_text()))


def ends(pid, patience=60):
    """Whether a process ends by itself: Ray answers before the system has taken away a process that it has killed."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_a_node_without_the_package_is_named(cluster, monkeypatch, tmp_path):
    module = types.ModuleType("only_on_the_driver")
    exec("def run_shard(job, shard, board): return 0", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(InputError, match=r"cannot load kvpress-engine \(ModuleNotFoundError.*only_on_the_driver"):
        stand_in(cluster, monkeypatch, tmp_path, module.run_shard).run()


def test_a_mistake_of_ours_keeps_its_traceback(cluster, monkeypatch, tmp_path):
    def fails(job, shard, board):
        return {}["nothing"]

    with pytest.raises(KeyError, match=r"line \d+, in fails"):
        stand_in(cluster, monkeypatch, tmp_path, fails).run()


def test_a_mistake_in_one_shard_is_the_run_s_sentence(cluster, unbroken, tmp_path, monkeypatch, capsys):
    folder = begun(tmp_path / "run", unbroken, 2 * N_ARMS)
    lines = (folder / "records.jsonl").read_text().splitlines()
    wrong = [
        line if i < N_ARMS else json.dumps({**json.loads(line), "prompt_sha": "0"}) for i, line in enumerate(lines)
    ]
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in wrong))
    code, out, err = here(monkeypatch, capsys, "resume", folder, "--ray", "auto", "--shards", 3)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: sample '0000")
    assert "of 'longbench/multifieldqa_en' is recorded with another prompt than it has now" in err
    assert "Traceback" not in err
    assert "lost its worker" not in err
    assert (folder / "records.jsonl").read_text().splitlines() == wrong
    (folder / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    Runner.resume(folder, "cpu").run()
    check_same_records(folder, unbroken)


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    with token(tmp_path / "here") as name:
        job = Job(tmp_path / "there", None, name, "cpu", 1)
        with pytest.raises(InputError, match=r"does not see the run's folder .*there': put it on a file system"):
            run_shard(job, Shard(), None)
        with pytest.raises(InputError, match="holds no run"):  # the folder is seen, and is empty
            run_shard(Job(tmp_path / "here", None, name, "cpu", 1), Shard(), None)
    assert not (tmp_path / "here").exists()


def test_a_node_with_another_version_is_named(tmp_path):
    with pytest.raises(InputError, match=r"and the driver 0\.0\.9: install one version"):
        run_shard(Job(tmp_path, None, "token", "cpu", 1, version="0.0.9"), Shard(), None)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "no Ray cluster at '127.0.0.1:1': connection refused; start one with `ray start --head`"),
        ("auto", "no Ray cluster at '127.0.0.1:2': connection refused"),
        ("cluster", "that is no HOST:PORT"),
        ("here:99999", "that is no HOST:PORT"),
        ("ray://127.0.0.1:10001", "run on a node of the cluster"),
    ],
)
def test_no_cluster_is_told_in_one_sentence(ray, monkeypatch, capsys, tmp_path, address, sentence):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    code, out, err = here(monkeypatch, capsys, "run", "trees.yaml", "--out", tmp_path / "run", "--ray", address)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_no_cluster_on_this_machine_is_told(ray, monkeypatch):
    def init(**settings):
        assert settings["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with (
        pytest.raises(InputError, match="none runs on this machine and RAY_ADDRESS is not set; start one"),
        connected("auto"),
    ):
        pass


OWN_CLUSTER = """
import os, ray
from kvpress_eval.ray.cluster import connected

def dies():
    os.kill(os.getpid(), 9)

with connected("local"):
    print(ray.get_runtime_context().gcs_address)
    try:
        ray.get(ray.remote(dies).options(max_retries=0).remote())
    except ray.exceptions.WorkerCrashedError:
        print("died")
print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_cluster_of_its_own_is_quiet_and_gone_afterwards(ray):
    done = subprocess.run([sys.executable, "-c", OWN_CLUSTER], capture_output=True, text=True, timeout=300)
    address, *rest = done.stdout.splitlines()
    assert (rest, done.stderr) == (["died", "False"], "")
    assert unreachable(address) == "connection refused"


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'kvpress-engine\[ray\]'"):
        import_ray()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--shards", "2"], "need --ray"),
        (["--cpus-per-shard", "1"], "need --ray"),
        (["--ray", "auto", "--workers", "2"], "instead of --shard"),
        (["--ray", "auto", "--device", "cpu"], "instead of --shard"),
        (["--ray", "auto", "--gpus-per-shard", "1.5"], "a whole number"),
        (["--ray", "auto", "--gpus-per-shard", "-1"], "a whole number"),
        (["--ray", "auto", "--gpus-per-shard", "nan"], "a whole number"),
        (["--ray", "auto", "--cpus-per-shard", "0"], "more than 0"),
    ],
)
def test_options_that_cannot_be_met_are_named(monkeypatch, capsys, tmp_path, options, sentence):
    code, _, err = here(monkeypatch, capsys, "run", "trees.yaml", "--out", tmp_path / "run", *options)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_how_many_shards_fit():
    small, large = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}
    assert Share().fit([small, large]) == (Share(1.0), 2)
    assert Share().fit([small]) == (Share(0.0), 4)
    assert Share(0).fit([small, large]) == (Share(0.0), 20)
    assert Share(0.5).fit([small, large])[1] == 4
    assert Share(0.4).fit([large])[1] == 4
    assert Share(0.1, 0.5).fit([large])[1] == 20
    assert Share(0.5, 8).fit([large])[1] == 2
    assert Share(2, 3).fit([large])[1] == 1
    assert Share(2, 3.5).threads == 3
    assert Share(cpus=0.5).threads == 1
    for share in (Share(3), Share(0, 17), Share(2, 17)):
        with pytest.raises(InputError, match=r"the most on one are 2 and 16.*use smaller"):
            share.fit([small, large])


def test_what_no_node_can_give_is_told_before_the_run_begins(cluster, tmp_path):
    with pytest.raises(InputError, match="has 1 GPUs and 1 CPUs"):
        run_on_ray(tmp_path / "run", load_sweep("trees.yaml"), "auto", 1, Share(1))
    assert not (tmp_path / "run").exists()


def test_progress_of_shards_is_summed_and_the_rest_guessed():
    told = []
    sums = Sums(lambda *args: told.append(args), 3)
    sums.note("a", "query_aware", 1, 2, 5)
    sums.note("a", "query_aware", 3, 0, 4)
    sums.note("a", "query_aware", 2, 1, 5)
    sums.note("b", "query_aware", 1, 0, 2)
    assert told == [
        ("a", "query_aware", 2, 15),
        ("a", "query_aware", 2, 14),
        ("a", "query_aware", 3, 14),
        ("b", "query_aware", 0, 6),
    ]


def test_the_board_tells_news_once():
    board = Board()
    board.begin(2, Place("node", 7))
    board.note(2, "a", "query_aware", 0, 5)
    board.note(2, "a", "query_aware", 1, 5)
    assert board.take() == ({2: Place("node", 7)}, [(("a", "query_aware", 2), (1, 5))])
    assert board.take() == ({}, [])


def test_a_diagnostic_over_ray_finds_what_a_local_one_finds(cluster, workplace, tmp_path):
    Path("study.yaml").write_text(
        Path("trees.yaml").read_text().replace("contracts: [snapkv, streaming_llm]\n", "")
        + "host: snapkv\nlimit: 6\nswaps: {mii: {swap: {ranking: mii}}}\nmeasure: {boundary: 1.0, units: 4, width: 4, draws: 1}\n"
    )
    Runner.begin(load_sweep("study.yaml"), tmp_path / "local", "cpu").run()
    run_on_ray(tmp_path / "ray", load_sweep("study.yaml"), "auto", 2)
    found = timeless(tmp_path / "ray")
    assert found == timeless(tmp_path / "local")
    assert all(record.measures for record in read_run(tmp_path / "ray"))
