"""A run: which records it makes, that they equal plain generation, and what stopping it at any point costs."""

import json
import os
import random

import pytest
import torch
from conftest import byte_tokenizer
from eval_support import toy_sweep

import kvpress
from kvpress.cache import CompressedCache
from kvpress.errors import ContractError, InputError
from kvpress_eval.arms import Arm
from kvpress_eval.bench import measure
from kvpress_eval.data import Data
from kvpress_eval.progress import Count
from kvpress_eval.prompt import render
from kvpress_eval.records import RecordFile, read_run
from kvpress_eval.runner import Runner
from kvpress_eval.tasks import TASKS, Request
from kvpress_eval.units import Shard, read_items

SMALL = [
    {**kvpress.Contract.load(name).model_dump(mode="json"), "name": name, "protection": {"kind": "standard", "sinks": 2, "recent": 4}}
    for name in ("snapkv", "streaming_llm", "mii", "oracle_mass")
] + [{**kvpress.Contract.load("kvzip").model_dump(mode="json"), "name": "kvzip",
      "query_law": {"kind": "reconstruction", "chunk": 64, "instruction": "", "continuation": ""}}]  # fmt: skip


def timeless(records):
    """Records as they must come out again: without the clock."""
    return {r.key: r.model_dump_json(exclude={"seconds"}) for r in records}


@pytest.fixture(scope="module")
def unbroken(model_folder, tmp_path_factory):
    """A whole run of both modes, and its records."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    sweep = toy_sweep(model_folder, contracts=SMALL, modes=["query_aware", "query_agnostic"], limit=4)
    Runner.begin(sweep, folder).run()
    return sweep, folder, read_run(folder)


def test_every_sample_has_every_arm_in_every_mode(unbroken):
    sweep, _, records = unbroken
    arms = {"full", *(f"{c['name']}@40%" for c in SMALL)}
    for mode in sweep.modes:
        for sample in range(4):
            found = {r.arm for r in records if r.mode == mode and r.sample == f"q{sample}"}
            assert found - {"full_repeat"} == arms
    assert [(r.sample, r.mode) for r in records if r.arm == "full_repeat"] == [("q0", "query_aware")]


def test_query_aware_answers_are_those_of_generate(unbroken, model_folder):
    _, _, records = unbroken
    model, tokenizer = kvpress.load(model_folder, dtype="float32")
    samples = {s.id: s for s in TASKS["toy/one"].samples(Request(tokenizer, Data(), limit=4))}
    for record in (r for r in records if r.mode == "query_aware"):
        sample = samples[record.sample]
        prompt = render(tokenizer, sample)
        ids = torch.tensor([prompt.ids])
        given = {"max_new_tokens": sample.max_new_tokens, "do_sample": False, "pad_token_id": 2}
        if record.arm in ("full", "full_repeat"):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
        else:
            contract = next(c for c in SMALL if c["name"] == record.contract)
            reference = torch.tensor([tokenizer(" " + sample.answers[0], add_special_tokens=False)["input_ids"]])
            with kvpress.compress(model, contract, budget="40%", tokenizer=tokenizer, reference=reference) as session:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
            assert record.contract_id == session.contract.id
        assert record.prediction == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), record.key
        assert record.n_new == out.shape[1] - ids.shape[1]


def test_records_say_what_it_cost(unbroken):
    _, _, records = unbroken
    for record in records:
        assert record.seconds.prefill > 0
        assert record.seconds.decode >= 0
        assert record.kept_bytes > 0
        if record.arm.startswith("full"):
            assert record.kept_share == 1
        else:
            # what is behind the context is stored in full where the cut does not know it
            n_cut = record.n_prompt if record.mode == "query_aware" else record.n_context
            share = (int(0.4 * n_cut) + record.n_prompt - n_cut) / record.n_prompt
            assert record.kept_share == pytest.approx(share, abs=1e-6)
            # keys and values of 2 x 8 float32, and 4 bytes of position for each token and head
            assert record.kept_bytes == pytest.approx(share * record.full_bytes * (1 + 4 / (2 * 8 * 4)), rel=1e-6)
        assert record.decode_rows == (1 if record.arm == "full_repeat" else 1 + len(SMALL))
        assert record.n_context < record.n_prompt


def test_query_agnostic_reads_each_context_once(model_folder, tmp_path, monkeypatch):
    from kvpress_eval.engine import Engine

    reads = []
    real = Engine._read
    monkeypatch.setattr(Engine, "_read", lambda self, ids, *rest: reads.append(ids) or real(self, ids, *rest))
    sweep = toy_sweep(model_folder, contracts=SMALL[:2], modes=["query_agnostic"], noise_floor=0)
    Runner.begin(sweep, tmp_path / "run").run()
    assert len(reads) == 6
    assert len(read_run(tmp_path / "run")) == 12 * 3


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_anywhere_resumes_to_the_same_records(unbroken, tmp_path, monkeypatch, seed):
    sweep, _, records = unbroken
    draw = random.Random(seed)
    folder = tmp_path / "run"

    class Killed(BaseException):
        pass

    real, lifetime = os.write, 0

    def write(handle, data):
        nonlocal lifetime
        lifetime -= 1
        if lifetime < 0:  # in the middle of a line
            real(handle, data[: draw.randrange(len(data))])
            raise Killed
        return real(handle, data)

    started = 0
    for _ in range(100):
        lifetime = draw.randrange(1, 20)
        runner = Runner.begin(sweep, folder) if not started else Runner.resume(folder)
        started += 1
        with monkeypatch.context() as patch:
            patch.setattr("kvpress_eval.records.os.write", write)
            try:
                runner.run()
                break
            except Killed:
                continue
    assert started > 2
    assert timeless(read_run(folder)) == timeless(records)
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert len(lines) == len(records)


def test_two_shards_make_the_records_of_one(unbroken, tmp_path):
    sweep, _, records = unbroken
    Runner.begin(sweep, tmp_path / "run").run(Shard(2, 3))
    for part in (1, 3):
        Runner.resume(tmp_path / "run").run(Shard(part, 3))
    assert timeless(read_run(tmp_path / "run")) == timeless(records)
    # another division finds nothing left to do
    assert Runner.resume(tmp_path / "run").run() == 0


def test_arms_decoded_alone_say_the_same(unbroken, tmp_path):
    sweep, _, records = unbroken
    alone = sweep.model_copy(update={"batch_arms": False, "modes": ("query_aware",), "limit": 2})
    Runner.begin(alone, tmp_path / "run").run()
    known = {record.key: record for record in records}
    for record in read_run(tmp_path / "run"):
        assert record.prediction == known[record.key].prediction
        assert record.decode_rows == 1


def test_a_full_disk_loses_no_record(unbroken, tmp_path, monkeypatch):
    _, _, records = unbroken
    path = tmp_path / "records.jsonl"
    real, room = os.write, [5000]

    def write(handle, data):
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        n = real(handle, data[: room[0]])
        room[0] -= n
        return n

    with RecordFile(path) as file:
        monkeypatch.setattr("kvpress_eval.records.os.write", write)
        with pytest.raises(InputError, match="No space left on device"):
            file.append(records)
    n_whole = len(path.read_bytes().splitlines())
    assert path.read_bytes().endswith(b"\n")
    assert 0 < n_whole < len(records)
    monkeypatch.undo()
    with RecordFile(path) as file:
        file.append(records[n_whole:])
    assert timeless(read_run(tmp_path)) == timeless(records)


def test_a_broken_last_line_costs_one_record(unbroken, tmp_path):
    _, folder, records = unbroken
    content = (folder / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(content[:-20])
    assert len(read_run(tmp_path)) == len(records) - 1
    with RecordFile(tmp_path / "records.jsonl"):
        pass
    assert (tmp_path / "records.jsonl").read_bytes().endswith(b"\n")


def test_a_broken_line_inside_is_named(unbroken, tmp_path):
    _, folder, _ = unbroken
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(lines[0] + b'{"task": 3}\n' + lines[1])
    with pytest.raises(InputError, match="line 2 is no record"):
        read_run(tmp_path)


def test_a_last_line_of_rubbish_costs_one_record(unbroken, tmp_path):
    _, folder, records = unbroken
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:-1]) + b"\0" * 40 + b"\n")
    assert len(read_run(tmp_path)) == len(records) - 1
    with RecordFile(tmp_path / "records.jsonl"):
        pass
    assert (tmp_path / "records.jsonl").read_bytes() == b"".join(lines[:-1])


def test_a_run_whose_prompts_have_changed_is_not_resumed(unbroken, tmp_path, monkeypatch):
    _, folder, _ = unbroken
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(b"".join(lines[:3]))
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    monkeypatch.setitem(TASKS["toy/one"].changes, "question", "\nAnd now for something else?")
    with pytest.raises(InputError, match="another prompt"):
        Runner.resume(tmp_path).run()


def test_records_of_another_run_are_not_gone_on_with(unbroken, model_folder, tmp_path):
    sweep, folder, _ = unbroken
    (tmp_path / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    with pytest.raises(InputError, match="empty folder"):
        Runner.begin(sweep, tmp_path)
    (tmp_path / "records.jsonl").unlink()
    Runner.begin(sweep.model_copy(update={"seed": 1}), tmp_path)
    (tmp_path / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    with pytest.raises(InputError, match="take them apart"):
        Runner.resume(tmp_path).run()


def test_a_bench_leaves_nothing_behind(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text("not ours")
    figures = measure(Runner.open(toy_sweep(model_folder, contracts=SMALL[:2], limit=2), None))
    assert (figures["samples"], figures["contracts"]) == (2, 2)
    assert figures["evaluation_seconds"] > 0
    assert figures["per_extra_contract"] is not None
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_text() == "not ours"


def test_progress_counts_lengths_apart_and_guesses_the_rest(model_folder):
    count = Count(toy_sweep(model_folder, modes=["query_aware", "query_agnostic"]))
    for done in (0, 5):
        count.note("toy/one@64", "query_aware", done, 5)
    assert (count.done, count.total) == (5, 10)
    count.note("toy/one@128", "query_aware", 2, 5)
    assert (count.done, count.total) == (7, 10)


def test_random_draws_other_positions_for_every_sample(model_folder, tmp_path, monkeypatch):
    seeds = []
    real = CompressedCache.__init__

    def init(self, model, contract, **rest):
        seeds.append(contract)
        real(self, model, contract, **rest)

    monkeypatch.setattr(CompressedCache, "__init__", init)
    chance = kvpress.Contract.load("random").swap(protection={"kind": "none"}).model_dump(mode="json")
    chance = {**chance, "name": "chance"}
    sweep = toy_sweep(model_folder, contracts=[chance], limit=3, noise_floor=0)
    Runner.begin(sweep, tmp_path / "run").run()
    drawn = [c.ranking.seed for c in seeds if getattr(c, "ranking", None) and c.ranking.kind == "random"]
    assert len(set(drawn)) == 3
    assert len({r.contract_id for r in read_run(tmp_path / "run") if r.arm == "chance@40%"}) == 1


def test_a_folder_that_cannot_be_written_is_named(unbroken, tmp_path):
    sweep, _, _ = unbroken
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        Runner.begin(sweep, tmp_path / "file")


def test_two_processes_cannot_write_one_file(tmp_path):
    with RecordFile(tmp_path / "records.jsonl"), pytest.raises(InputError, match="another process"):
        RecordFile(tmp_path / "records.jsonl")


def test_manifest_tells_what_the_run_depends_on(unbroken):
    _, folder, _ = unbroken
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sweep"]["limit"] == 4
    assert manifest["model"]["class"] == "LlamaForCausalLM"
    assert set(manifest["arms"]) == {"full", *(f"{c['name']}@40%" for c in SMALL)}
    assert manifest["tasks"]["toy/one"]["n"] == 4
    assert manifest["software"][0]["torch"] == torch.__version__


def test_a_run_is_not_begun_twice_nor_resumed_with_another_model(unbroken, tmp_path):
    sweep, folder, _ = unbroken
    with pytest.raises(InputError, match="holds a run already"):
        Runner.begin(sweep, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["digest"] = "0" * 16
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="another model"):
        Runner.resume(tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        Runner.resume(tmp_path / "nowhere")


def test_a_contract_that_cannot_be_met_stops_with_what_is_recorded(model_folder, tmp_path):
    sweep = toy_sweep(model_folder, tasks=[{"task": "toy/two"}, {"task": "toy/one"}], contracts=SMALL[:1], limit=2)
    folder = tmp_path / "run"
    runner = Runner.begin(sweep, folder)
    tight = kvpress.Contract.load("snapkv", 0.05)
    real = runner.read_tasks

    def read_tasks():
        for found in real():
            if found[0].name == "toy/one":
                runner.arms[1:] = []
                engines[0].arms.append(Arm("tight", tight))
            yield found

    engines = [runner.engine()]
    runner.read_tasks, runner.engine = read_tasks, lambda: engines[0]
    with pytest.raises(ContractError, match="budget"):
        runner.run()
    assert {record.task for record in read_run(folder)} == {"toy/two"}
    assert len(read_run(folder)) == 2 * 2 + 1


def test_what_is_wrong_with_the_last_task_is_told_before_the_first_answer(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS["toy/two"].changes, "max_new_tokens", 900)
    monkeypatch.setattr(TASKS["toy/two"], "needs_length", True, raising=False)
    sweep = toy_sweep(model_folder, tasks=[{"task": "toy/one"}, {"task": "toy/two", "length": 99}], contracts=[])
    with pytest.raises(InputError, match=r"'toy/two'.*context is 512"):
        Runner.begin(sweep, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_beyond_the_context_stops_the_run(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["toy/one"], "needs_length", True, raising=False)
    sweep = toy_sweep(model_folder, tasks=[{"task": "toy/one", "length": 99}], contracts=[])
    monkeypatch.setitem(TASKS["toy/one"].changes, "max_new_tokens", 500)
    with pytest.raises(InputError, match="context is 512"):
        Runner.begin(sweep, tmp_path / "run").run()
    # the last token of an answer is never read, so it needs no room
    n_prompt = len(
        render(byte_tokenizer(), next(TASKS["toy/one"].samples(Request(byte_tokenizer(), Data(), limit=1)))).ids
    )
    monkeypatch.setitem(TASKS["toy/one"].changes, "max_new_tokens", 513 - n_prompt)
    request = Request(byte_tokenizer(), Data(), limit=1)
    assert read_items(TASKS["toy/one"], request, context=512)
    with pytest.raises(InputError, match="context is 511"):
        read_items(TASKS["toy/one"], request, context=511)


def test_a_metric_by_name_replaces_the_benchmarks_own(model_folder, tmp_path, monkeypatch):
    sweep = toy_sweep(model_folder, tasks=[{"task": "toy/one", "metric": "code_sim-indel"}], contracts=[], limit=1)
    Runner.begin(sweep, tmp_path / "run").run()
    record = read_run(tmp_path / "run")[0]
    assert (record.metric, record.scorer.split()[0]) == ("code_sim-indel", "code_sim-indel")
    for metric in ("needle_parallel", "needle_keyword_v1"):
        unfit = toy_sweep(model_folder, tasks=[{"task": "toy/two", "metric": metric}], contracts=[])
        monkeypatch.setitem(TASKS["toy/two"].changes, "evidence", ())
        with pytest.raises(InputError, match=f"'{metric}' cannot score"):
            Runner.begin(unfit, tmp_path / metric).run()
    wrong = toy_sweep(model_folder, tasks=[{"task": "toy/one", "metric": "rouge"}])
    with pytest.raises(InputError, match="unknown metric 'rouge'"):
        Runner.begin(wrong, tmp_path / "other")
