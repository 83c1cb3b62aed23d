"""The device check and the bench, run in the interpreter at a small size: their own code must be right too."""

import importlib
import json
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvpress_kernels import ops
from kvpress_kernels.bench import __main__ as bench
from kvpress_kernels.bench import timing
from kvpress_kernels.bench.measurement import Measurement, Prepared, measure, table
from kvpress_kernels.bench.ragged_decode import decode_bytes, skewed
from kvpress_kernels.bench.shapes import TINY, filled
from kvpress_kernels.check import __main__ as check
from kvpress_kernels.check.cases import Case, PoisonedBuffers, SkippedError, Trial, difference, judge, same_bits
from kvpress_kernels.check.inputs import FULL, SMALL, _far_entries, stored
from kvpress_kernels.check.smoke import SMOKE
from kvpress_kernels.check.suite import cases, device_name
from kvpress_kernels.pages import PageLayout

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
#: cases that the interpreter takes long for: every so many of them
EVERY = {
    "window_scores": 8, "cumulative_mass": 6, "ragged_attention": 3, "ragged_decode": 5, "compact": 3, "append": 2,
    "leave_one_out": 2, "joint_change": 2, "split_reduce": 2, "lowrank_decode": 2, "project_append": 2,
}  # fmt: skip


class CountingTimer:
    """Runs every launch once, and says that it took a microsecond."""

    def __init__(self):
        self.launches = 0

    def __call__(self, launches, at_most=None):
        for launch in launches:
            launch()
        self.launches += len(launches)
        return 1e-6


@pytest.mark.parametrize("op", ops.OPS)
def test_every_op_passes_its_checks(op):
    findings = [f for case in list(cases(op, SMALL))[:: EVERY.get(op, 1)] for f in judge(case, CPU)]
    assert findings
    assert [f for f in findings if not f.ok] == []
    assert any(f.error is not None for f in findings)


@pytest.mark.parametrize("op", ops.OPS)
def test_cases_on_a_device_cover_what_they_should(op):
    labels = [case.label for case in cases(op, FULL)]
    assert len(set(labels)) == len(labels)
    if op in ("ragged_decode", "append", "gather_pages", "compact", "rerotate", "ragged_attention", "lowrank_decode"):
        assert sum("2^31" in label for label in labels) == len(FULL.dtypes)
        assert any("P16" in label for label in labels) or op == "append"
        assert any("D192" in label for label in labels)


@pytest.mark.parametrize("op", ["ragged_decode", "compact"])
def test_every_op_can_be_tried_quickly(op):
    assert set(SMOKE) == set(ops.OPS)
    SMOKE[op](CPU)


def broken(name, change):
    """The kernel of an op with its results changed."""
    kernel = getattr(importlib.import_module(f"kvpress_kernels.{name}"), name)

    def function(*arguments, **options):
        return change(kernel(*arguments, **options))

    return function


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (lambda found: found._replace(lse=found.lse + 1e-3), "lse"),
        (lambda found: found._replace(output_wide=found.output_wide * (1 + 1e-5)), "output_wide"),
        (lambda found: found._replace(page_lse=found.page_lse.roll(1, 2)), "page_lse"),
        (lambda found: found._replace(output=torch.empty_like(found.output)), "output"),
        (lambda found: found._replace(lse=found.lse + torch.rand(()) * 1e-6), "results that differ in a second run"),
    ],
)
def test_wrong_results_are_found(monkeypatch, change, quantity):
    torch.manual_seed(0)
    monkeypatch.setattr("kvpress_kernels.ragged_decode.ragged_decode", broken("ragged_decode", change))
    case = next(cases("ragged_decode", SMALL))
    assert quantity in [finding.quantity for finding in judge(case, CPU) if not finding.ok]


def test_a_kernel_that_moves_nothing_is_found(monkeypatch):
    monkeypatch.setattr("kvpress_kernels.compact.compact", lambda *arguments: None)
    case = next(cases("compact", SMALL))
    assert {"keys", "values", "positions", "lengths"} <= {f.quantity for f in judge(case, CPU) if not f.ok}


def test_a_kernel_that_is_worse_than_torch_is_found():
    right = torch.ones(4)
    trial = Trial(
        lambda: {"output": right + 1e-4},
        lambda: {"output": right.double()},
        {"output": 1e-3},
        peers=lambda _: {"output": 1e-5},
    )
    findings = judge(Case("op", "case", lambda device: trial), CPU)
    assert [f.quantity for f in findings if not f.ok] == ["output, of torch's"]


def test_a_case_that_raises_fails_and_one_that_cannot_run_does_not():
    def failing(device):
        raise ValueError("no")

    (finding,) = judge(Case("op", "case", failing), CPU)
    assert not finding.ok
    assert "no" in finding.note


def test_far_pages_need_memory(monkeypatch):
    pages = SimpleNamespace(device=torch.device("cuda"), layout=PageLayout(32, 128, 128, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    with pytest.raises(SkippedError, match=r"needs 4\.3 GB of pages, 1\.0 GB are free"):
        _far_entries(pages, 10)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 80 * 10**9))
    pages.add_slab = lambda n_pages: torch.arange(n_pages) * (pages.layout.nbytes // 16)
    entries = _far_entries(pages, 10)
    assert len(entries.unique()) == 10
    assert (entries.max() - entries.min()) * 8 > 2**31, "in elements of two bytes"


def test_differences():
    one, infinite = torch.ones(3), torch.tensor([1.0, -math.inf])
    assert difference(one, one) == 0
    assert difference(one * 1.1, one) == pytest.approx(0.1, rel=1e-3)
    assert difference(infinite, infinite) == difference(infinite, infinite, absolute=True) == 0
    assert difference(infinite, -infinite) == math.inf
    assert difference(one + math.nan, one) == difference(one[:2], one) == math.inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0
    assert difference(torch.ones(2), torch.zeros(2)) == math.inf
    assert difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), absolute=True) == 2
    assert difference(one[:0], one[:0], absolute=True) == 0
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(one * math.nan, one * math.nan)


def test_buffers_are_poisoned():
    with PoisonedBuffers():
        made = [torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(2).new_empty(4)]
        whole = torch.empty(2, dtype=torch.int32)
    assert all(part.isnan().all() for part in made)
    assert (whole == torch.iinfo(torch.int32).max).all()
    with PoisonedBuffers():
        assert torch.zeros(2).eq(0).all()


def test_stored_tokens_lie_scattered_among_poison():
    counts = [0, 17, 15, 1]
    held = stored(CPU, PageLayout(16, 24, 12, torch.float32), counts, room=5)
    read = held.read()
    assert read.keys.shape == (33, 24)
    assert not any(part.isnan().any() for part in read[:2])
    row, _ = held.slots()
    steps = read.positions.diff()[row[1:] == row[:-1]]
    assert (steps > 0).all()
    assert all(read.positions[row == r][0] >= 0 for r in (1, 2, 3))
    assert len(held.pages.slabs) == 2
    behind = held.read([count + 1 for count in counts])  # one slot further: poison
    assert behind.keys.isnan().any(1).sum() == 4
    named = held.page_table[1, : (17 + 5 + 15) // 16]
    assert len(set(named.tolist())) == 2


def test_check_prints_a_table_and_a_line_of_json(capsys, tmp_path):
    assert check.main(["--op", "work_list", "--json", str(tmp_path / "check.json")]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads(out[-1])
    assert found["failed"] == 0
    assert found == json.loads((tmp_path / "check.json").read_text())
    assert out[1].split()[:2] == ["op", "case"]
    assert all(line.rstrip().endswith("ok") for line in out[1:-1])


def test_check_fails_when_a_kernel_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr("kvpress_kernels.work_list.work_list", broken("work_list", lambda w: w._replace(row=w.row + 1)))
    assert check.main(["--op", "work_list"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["check", "bench"])
def test_without_a_device_one_sentence_says_so(module):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"kvpress_kernels.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout.startswith("No CUDA or ROCm device here")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("op", ops.OPS)
def test_every_op_has_measurements_that_run(op):
    timer = CountingTimer()
    works = list(bench.measurements(op, TINY, CPU))
    assert works
    settings = [json.dumps(dict(work.setting)) for work in works]
    assert len(set(settings)) == len(settings)
    for work in works[:: EVERY.get(op, 1)]:
        row = measure(work, CPU, timer, 1e12, "ok", rotation=1)
        assert row["gate"] == "ok", row
        assert row["microseconds"] == pytest.approx(1.0)
        assert row["tb_per_s"] == pytest.approx(work.nbytes * 1e6 / 1e12)
    assert timer.launches >= len(works[:: EVERY.get(op, 1)])


def test_bench_writes_rows_and_takes_the_copy_from_the_same_run(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert bench.main(["--op", "split_reduce", "--json", str(path)], CountingTimer()) == 0
    found = json.loads(path.read_text())
    copy, *rows = found["rows"]
    assert copy["op"] == "copy"
    assert found["device"] == device_name()
    for row in rows:
        assert row["of_copy"] == pytest.approx(row["tb_per_s"] / copy["tb_per_s"])
    assert "split_reduce" in capsys.readouterr().out


def test_a_wrong_op_gets_no_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("kvpress_kernels.work_list.work_list", broken("work_list", lambda w: w._replace(row=w.row + 1)))
    timer = CountingTimer()
    assert bench.main(["--op", "work_list", "--json", str(tmp_path / "rows.json")], timer) == 1
    _, *rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all(row["microseconds"] is None and "checks failed" in row["gate"] for row in rows)
    assert timer.launches == 1, "only the copy was timed"
    assert "checks failed" in capsys.readouterr().out


def test_a_result_unlike_the_baseline_gets_no_time():
    one = Prepared(lambda: None, agree=lambda: (0.1, 0.01))
    row = measure(Measurement("op", {}, lambda device, seed: one, 8), CPU, CountingTimer(), 1.0, "ok")
    assert row["microseconds"] is None
    assert "differs" in row["gate"]


def test_failures_are_told_apart():
    def fails():
        raise RuntimeError("out of memory")

    one = Prepared(lambda: None, {"theirs": fails, "absent": "not installed"})
    row = measure(Measurement("op", {"n": 1}, lambda device, seed: one, 8), CPU, CountingTimer(), 1.0, "ok")
    assert row["microseconds"] is not None
    assert row["baselines"] == {"theirs": "RuntimeError: out of memory", "absent": "not installed"}
    assert "not installed" in table([row])
    row = measure(Measurement("op", {}, lambda device, seed: Prepared(fails), 8), CPU, CountingTimer(), 1.0, "ok")
    assert row["microseconds"] is None
    assert row["gate"] == "RuntimeError: out of memory"


@pytest.mark.parametrize("at_most", [None, 256, 20, 5])
@pytest.mark.parametrize("microseconds", [3.0, 50.0, 5000.0])
def test_a_time_is_that_of_one_launch_and_launches_are_counted(monkeypatch, microseconds, at_most):
    """The timer without a device: a graph is a list of launches, and takes as long as they and its start do."""
    runs = [0, 0, 0]
    launches = [lambda i=i: runs.__setitem__(i, runs[i] + 1) for i in range(3)]
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def seconds(graph):
        for launch in graph:
            launch()
        return (len(graph) * microseconds + 5) * 1e-6

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(timing, "_captured", lambda launches, rounds: [*launches] * rounds)
    monkeypatch.setattr(timing, "_seconds", seconds)
    found = timing.graph_timer(launches, at_most)
    assert microseconds * 1e-6 <= found <= (microseconds + 2) * 1e-6
    assert len(set(runs)) == 1
    if at_most is not None:
        assert runs[0] <= at_most
    elif microseconds < 1000:
        assert found <= microseconds * 1.01 * 1e-6, "the start of a graph does not count"


def test_inputs_rotate():
    made = []

    def prepare(device, seed):
        made.append(seed)
        return Prepared(lambda: None)

    measure(Measurement("op", {}, prepare, 30), CPU, CountingTimer(), 1.0, "ok", rotation=100)
    assert made == [0, 1, 2, 3]


def test_bytes_of_a_decode_step():
    layout = PageLayout(32, 128, 128, torch.bfloat16)
    counts = [32768] * 8
    plain = decode_bytes(layout, counts, 4, "none", 132)
    keys_and_values = 8 * 32768 * 2 * 128 * 2
    assert keys_and_values < plain < 1.02 * keys_and_values
    lse, values = (decode_bytes(layout, counts, 4, statistics, 132) - plain for statistics in ("lse", "values"))
    assert lse == 8 * 1024 * 4 * 4
    assert values == 8 * 1024 * 4 * (4 + 256)
    assert sum(skewed(8192, 4, 8)) == pytest.approx(8 * 8192, rel=1e-3)
    assert max(skewed(8192, 4, 8)) == 4 * 8192


def test_filled_pages_hold_what_dense_says():
    held = filled(CPU, TINY.layout(), [16, 16], seed=0, room=16)
    keys, values = held.dense()
    assert keys.shape == values.shape == (2, 32, 16)
    views = held.pages.read(held.page_table[1])
    assert torch.equal(views.keys.flatten(0, 1), keys[1])
    assert views.positions.flatten().tolist() == list(range(32))
    longer = replace(TINY, page_sizes=(32,)).layout()
    assert longer.page_size == 32
