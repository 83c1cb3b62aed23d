"""The summary of a run and its forms: hand-computed numbers, missing records, JSON, CSV, tables, command."""

import csv
import io
import json
import re

import pytest
from record_factory import HOSTILE, MANIFEST, NEEDLES, record, scores, small_run, synthetic_run, write_run
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from kvpress.errors import InputError
from kvpress_eval.cli.report import report
from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.report import summarize
from kvpress_eval.report.export import to_csv, to_json
from kvpress_eval.report.losses import shorten
from kvpress_eval.report.tables import tables
from kvpress_eval.report.text import signed, size

ARM = "snapkv@25%"


@pytest.fixture(scope="module")
def run():
    return synthetic_run(n_samples=6)


@pytest.fixture(scope="module")
def summary(run):
    return summarize(run, MANIFEST)


def test_a_row_by_hand():
    row = next(row for row in summarize(small_run(), {}).rows if (row.task, row.arm) == ("made/one", ARM))
    assert (row.score, row.full_score, row.delta) == pytest.approx((40.0, 80.0, -40.0))
    assert (row.n, row.n_clusters, row.lost, row.gained, row.solved, row.kept) == (5, 5, 2, 0, 4, 2)
    assert row.p == pytest.approx(0.25)  # 2 * (1/4) - 2 * (1/4) / 2
    assert row.p_adjusted == pytest.approx(0.25)  # the other row has 1/32
    assert row.interval == "tango"
    assert row.cost.byte_share == 0.25
    assert row.cost.decode_tokens_per_second is None
    assert row.cost.decode_rows == 4


def test_a_macro_row_by_hand():
    rows = {row.arm: row for row in summarize(small_run(), {}).macro if row.scope == "all"}
    assert (rows[FULL].score, rows[FULL].delta, rows[FULL].verdict) == (90.0, None, None)
    assert (rows[ARM].score, rows[ARM].delta) == pytest.approx((20.0, -70.0))
    assert (rows[ARM].n_tasks, rows[ARM].n_min, rows[ARM].n_max) == (2, 5, 5)
    # of 2^7 patterns of signs of seven lost items, two are as extreme
    assert rows[ARM].p == rows[ARM].p_adjusted == pytest.approx(2 / 2**7)
    assert rows[ARM].verdict == "loss"


def test_decode_speed_only_where_answers_were_decoded_alone():
    records = [record(decode_rows=1), record(sample="1", decode_rows=1)]
    assert summarize(records, {}).rows[0].cost.decode_tokens_per_second == pytest.approx(6.0)  # 24 tokens in 4 s
    records[1] = record(sample="1", decode_rows=2)
    assert summarize(records, {}).rows[0].cost.decode_tokens_per_second is None


def test_missing_partners_are_counted_and_left_out():
    records = [one for one in small_run() if (one.task, one.arm, one.sample) != ("made/one", ARM, "0")]
    records.append(record("made/one", "9", ARM, 1.0))
    found = summarize(records, {})
    row = next(row for row in found.rows if (row.task, row.arm) == ("made/one", ARM))
    assert (row.n, row.missing, row.extra, row.incomplete) == (4, 1, 1, True)
    assert row.score == 25.0
    assert row.full_score == 75.0
    assert row.ci_low is None
    assert row.verdict == "undecided"
    assert [problem.count for problem in found.problems if "no partner" in problem.sentence] == [1, 1]
    assert next(row for row in found.macro if row.arm == ARM).incomplete


def test_fewer_samples_than_planned_are_marked():
    plan = {"tasks": {"made/one@2048": {"n": 6, "caveat": "made up"}, "made/two@2048": {"n": 5}}}
    found = summarize(small_run(), plan)
    assert {row.task for row in found.rows if row.incomplete} == {"made/one"}
    assert found.caveats == {"made/one": "made up"}


def test_an_arm_without_a_whole_task_is_marked():
    records = [one for one in small_run() if (one.task, one.arm) != ("made/two", ARM)]
    row = next(row for row in summarize(records, {}).macro if row.arm == ARM)
    assert row.missing_tasks == ("made/two",)
    assert row.incomplete
    assert row.full_score == 80.0  # of the one task that both have


def test_different_numbers_of_items_are_shown():
    records = small_run() + scores("made/three", FULL, [1.0] * 8) + scores("made/three", ARM, [1.0] * 8)
    row = next(row for row in summarize(records, {}).macro if row.arm == ARM)
    assert (row.n_min, row.n_max) == (5, 8)


def test_floor_and_ceiling_tasks_stand_apart():
    floor = scores("made/floor", FULL, [0.0] * 5) + scores("made/floor", ARM, [0.0] * 5)
    ceiling = scores("made/ceiling", FULL, [1.0] * 5) + scores("made/ceiling", ARM, [1.0] * 5)
    rows = {row.scope: row for row in summarize(small_run() + floor + ceiling, {}).macro if row.arm == ARM}
    assert rows["all"].n_tasks == 4
    assert rows["informative"].tasks == ("made/one", "made/two")  # two: full at the ceiling, but the arm fell
    assert set(rows["floor or ceiling"].tasks) == {"made/floor", "made/ceiling"}


def test_modes_and_lengths_are_never_mixed(summary):
    for row in summary.macro:
        assert len({(r.length, r.mode) for r in summary.rows if r.task in row.tasks and r.mode == row.mode}) == 1
    assert {row.mode for row in summary.macro} == {"query_aware", "query_agnostic"}


def test_the_repeat_of_the_full_cache_is_noise_and_no_arm():
    full = scores("made/one", FULL, [1, 1, 1, 1, 0, 1])
    repeat = scores("made/one", FULL_REPEAT, [1, 1, 0, 1, 0, 1], prediction="another text")
    arm = scores("made/one", ARM, [1, 1, 1, 1, 1, 1])
    found = summarize(full + repeat + arm, {})
    assert {row.arm for row in found.rows} == {FULL, ARM}
    (floor,) = found.noise
    assert (floor.n, floor.flips, floor.changed, floor.other_text) == (6, 1, 1, 6)
    assert floor.mean_abs == pytest.approx(100 / 6)
    assert next(row for row in found.rows if row.arm == ARM).within_noise is None  # six repeats tell nothing


def test_a_run_without_the_full_cache_is_refused():
    with pytest.raises(InputError, match="arm 'full'"):
        summarize([record(arm=ARM)], {})
    with pytest.raises(InputError, match="no records yet"):
        summarize([], {})


def test_depths_by_hand():
    parts = [{"depth 0": 1.0, "depth 50": 0.0}, {"depth 0": 1.0, "depth 50": 1.0}]
    records = [record(sample=str(index), score=0.5, parts=part) for index, part in enumerate(parts)]
    records += [
        record("made/two", str(index), score=float(index), meta={"depth": 40, "length": 99}) for index in (0, 1)
    ]
    one, two = summarize(records, {}).depths
    assert one.scores == {(2048, 0.0): 100.0, (2048, 50.0): 50.0}
    assert two.scores == {(99, 40.0): 50.0}
    assert two.counts == {(99, 40.0): 2}


def test_worst_losses_are_solved_items_that_an_arm_lost():
    losses = summarize(small_run(), {}).losses
    assert {(loss.task, loss.arm) for loss in losses} == {("made/one", ARM), ("made/two", ARM)}
    assert all(loss.full_score == 100 and loss.score == 0 for loss in losses)


def test_shown_texts_are_cut_and_cannot_turn_the_page_around():
    assert shorten("x" * 1000) == "x" * 197 + " […] " + "x" * 197
    assert shorten("a\u202eb\x1b[0m\nc") == "a[U+202E]b[U+001B][0m\nc"


def test_json_is_complete_and_strict(summary):
    found = json.loads(json.dumps(to_json(summary), allow_nan=False))
    assert {"rows", "macro", "noise_floor", "manifest", "units", "margins"} <= found.keys()
    assert len(found["rows"]) == 14 * 10 * 2
    wanted = {"family", "task", "length", "mode", "arm", "score", "n", "delta", "ci_low", "ci_high", "kept_bytes"}
    assert all(wanted <= row.keys() for row in found["rows"])
    assert all(wanted - {"task", "n"} <= row.keys() for row in found["macro"])
    for row in [*found["rows"], *found["macro"]]:
        assert 0 <= row["score"] <= 100
        if row["ci_low"] is not None:
            assert -100 <= row["ci_low"] <= row["delta"] <= row["ci_high"] <= 100


def test_the_same_run_gives_the_same_report(run, summary):
    assert to_json(summarize(run[::-1], MANIFEST)) == to_json(summary)


def test_csv_has_a_line_for_each_row(summary):
    lines = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert len(lines) == len(summary.rows)
    assert float(lines[0]["score"]) == pytest.approx(summary.rows[0].score)
    assert float(lines[0]["kept_bytes"]) == pytest.approx(summary.rows[0].cost.kept_bytes)


def test_csv_texts_are_no_formulas():
    text = to_csv(summarize([record("=1+1/x")], {}))
    assert next(csv.DictReader(io.StringIO(text)))["task"] == "'=1+1/x"


def test_tables_fit_into_a_hundred_columns(summary):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables(summary))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if "…" in line]
    first = next(index for index, line in enumerate(lines) if line.startswith("ruler, 2,048 tokens, query-aware"))
    assert lines[first + 2].startswith("full ")


def test_tables_fit_into_eighty_columns_without_breaking_an_arms_name(summary):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables(summary, width=80))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if "@25%" in line} <= {row.arm for row in summary.rows}
    assert not [line for line in lines if "…" in line]


def test_numbers_in_words():
    assert signed(-0.04) == "0.0"
    assert signed(-3.26) == "−3.3"
    assert signed(None) == "–"
    assert (size(999), size(25_165_824), size(3.2e9)) == ("999 B", "25.2 MB", "3.2 GB")


@pytest.fixture
def command():
    app = Typer()
    app.command()(report)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_page_and_rows(command, tmp_path):
    folder = write_run(tmp_path / "run", small_run())
    done = command(folder)
    assert done.exit_code == 0, done.output
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert len((folder / "report.csv").read_text().splitlines()) == 5
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "records.jsonl", "report.csv", "report.html",
    ]  # fmt: skip


def test_json_goes_to_stdout_alone_and_writes_nothing(command, tmp_path):
    folder = write_run(tmp_path / "run", small_run())
    done = command(folder, "--json")
    assert json.loads(done.stdout)["rows"]
    assert not (folder / "report.html").exists()
    assert not (folder / "report.csv").exists()
    assert command(folder, "--json", "--csv", tmp_path / "rows.csv").exit_code == 0
    assert (tmp_path / "rows.csv").is_file()


def test_places_that_cannot_be_written_are_told(command, tmp_path):
    folder = write_run(tmp_path / "run", small_run())
    (tmp_path / "file").write_text("")
    done = command(folder, "--csv", tmp_path / "file" / "rows.csv")
    assert isinstance(done.exception, InputError)
    assert "cannot write" in str(done.exception)


@pytest.mark.parametrize(
    "records",
    [
        scores("made/one", FULL, [1.0]),
        small_run()[:10] + scores("made/one", ARM, [1.0] * 5)[:3],
        scores("made/one", FULL, [0.0] * 6) + scores("made/one", "an arm without a budget", [0.0] * 6),
        synthetic_run(n_samples=5, lengths=(1024, 4096), tasks=(NEEDLES,)),
        scores("made/$x_{1", FULL, [1.0] * 6, length=None) + scores("made/$x_{1", ARM, [0.5] * 6, length=None),
    ],
    ids=["full alone", "too few", "all at the floor", "two lengths", "odd names"],
)
def test_small_and_odd_runs_have_a_page(records):
    from kvpress_eval.report.html import to_html

    page = to_html(summarize(records, {}))
    assert page.count("<h2") >= 11
    assert not re.search(r"\b(nan|None|inf)\b", page.partition('id="manifest"')[0])


def test_tasks_that_are_not_averaged_still_have_their_rows(monkeypatch):
    from kvpress_eval.report import summary as module
    from kvpress_eval.report.html import to_html

    monkeypatch.setattr(module, "_in_macro", lambda task: False)
    found = summarize(small_run(), {})
    assert found.macro == []
    assert {row.scope for row in found.rows} == {"not averaged"}
    assert "not averaged" in to_html(found)


def test_a_hostile_prediction_stays_text():
    from kvpress_eval.report.html import to_html

    records = [*small_run(), *scores("made/two", "h2o@25%", [0.0] * 5, prediction=HOSTILE, answers=("</pre><img>",))]
    page = to_html(summarize(records, {**MANIFEST, "note": "</pre><script>alert(1)</script>"}))
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert" in page
    assert "<img" not in page
    assert "\u202e" not in page
