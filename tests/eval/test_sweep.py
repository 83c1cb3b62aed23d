"""Sweep files: what they say, and the one sentence for everything that is wrong in them."""

from pathlib import Path

import pytest

from kvpress.errors import ContractError, InputError
from kvpress_eval.arms import make_arms
from kvpress_eval.runner import Runner, tasks_of
from kvpress_eval.sweep import TaskChoice, load_sweep, sweeps_folder
from kvpress_eval.units import Shard


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_names_and_options(tmp_path):
    path = write(tmp_path, "model: m\nlimit: 9\ntasks: [{task: ruler-2026, limit: 7}, {task: longbench/qasper}]\n")
    sweep = load_sweep(path, limit=3, model=None, length=4096)
    assert (sweep.name, sweep.model, sweep.limit) == ("mine", "m", 3)
    assert [task.length for task in sweep.tasks] == [4096, None]
    assert [task.limit for task in sweep.tasks] == [None, None]
    assert [task.limit for task in load_sweep(path).tasks] == [7, None]


def test_folders_of_data_do_not_depend_on_where_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "model: m\ntasks: [{task: longbench/qasper}]\ndata: [here, ~/there]\n")
    assert load_sweep(path).data == (str(tmp_path / "here"), str((Path.home() / "there").resolve()))


def test_a_file_name_with_a_space_names_a_sweep(tmp_path):
    path = tmp_path / "my sweep.yaml"
    path.write_text("model: m\ntasks: [{task: longbench/qasper}]\n")
    assert load_sweep(path).name == "my-sweep"


@pytest.mark.parametrize("name", sorted(path.stem for path in sweeps_folder().glob("*.yaml")))
def test_the_sweeps_that_come_with_the_package_are_whole(name):
    sweep = load_sweep(name)
    arms = sweep.arms()
    assert arms[0].name == "full"
    assert all(tasks_of(choice) for choice in sweep.tasks)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: m\n", "field 'tasks'"),
        ("model: m\ntasks: []\n", "field 'tasks'"),
        ("model: m\ntasks: [{task: a, lenght: 3}]\n", "field 'tasks.0.lenght'"),
        ("model: m\ntasks: [{task: a}]\nmodes: [blind]\n", "field 'modes.0'"),
        ("- a\n- b\n", "holds no mapping"),
        ("model: [\n", "no valid YAML at line"),
        ("model: !!python/object/apply:os.system [true]\n", "no valid YAML"),
        ("model: m\ntasks: [{task: a}]\non: 1\n", "field True is no name"),
        ("model: m\ntasks: [{task: a}]\nname: 2024-13-45\n", "no valid YAML"),
        ("model: m\ntasks: [{task: a}]\nseed: " + "9" * 5000 + "\n", "no valid YAML"),
        ("model: m\ntasks: [{task: a}]\nmodes: [query_aware, query_aware]\n", "field 'modes'"),
        ("model: m\nname: ../x\ntasks: [{task: a}]\n", "field 'name'"),
    ],
)
def test_wrong_files(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        load_sweep(write(tmp_path, text))


def test_missing_sweeps_and_huge_ones(tmp_path):
    with pytest.raises(InputError, match="ruler-2k"):
        load_sweep("no-such-sweep")
    with pytest.raises(InputError, match="cannot be read"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="over 256 KiB"):
        load_sweep(write(tmp_path, "#" * 300_000))


def test_tasks_that_need_a_length_or_do_not_exist(tmp_path):
    with pytest.raises(InputError, match="give one"):
        tasks_of(TaskChoice(task="ruler-2026"))
    with pytest.raises(InputError, match="did you mean 'ruler-2026'"):
        tasks_of(TaskChoice(task="ruler-2062"))
    sweep = load_sweep(write(tmp_path, "model: nowhere\ntasks: [{task: ruler-2026}]\n"))
    with pytest.raises(InputError, match="give one"):  # before the model is looked for
        Runner.begin(sweep, tmp_path / "run")


def test_arms():
    arms = make_arms(["snapkv", "full", {"name": "mine", "ranking": {"kind": "random"}}], ["25%", 512, "20MB"])
    assert [arm.name for arm in arms] == [
        "full", "snapkv@25%", "snapkv@512tokens", "snapkv@20MB", "full@25%", "full@512tokens", "full@20MB",
        "mine@25%", "mine@512tokens", "mine@20MB",
    ]  # fmt: skip
    assert [arm.budget for arm in arms[:3]] == [None, "25%", "512tokens"]
    assert [arm.name for arm in make_arms(["full", "snapkv"], [])] == ["full", "snapkv@25%"]
    with pytest.raises(InputError, match="twice"):
        make_arms(["snapkv", "snapkv"], [])
    with pytest.raises(ContractError, match="snapkv"):
        make_arms(["snapvk"], [])


def test_shards():
    assert Shard.parse("2/4") == Shard(2, 4)
    for wrong in ("0/4", "5/4", "2", "a/b", "2/4/6", "-1/2"):
        with pytest.raises(InputError, match="not understood"):
            Shard.parse(wrong)
    parts = [list(Shard(i, 3).of(range(10))) for i in (1, 2, 3)]
    assert sorted(unit for part in parts for unit in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
