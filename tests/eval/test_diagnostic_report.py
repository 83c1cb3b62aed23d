"""The report of a diagnostic run: numbers by hand, sentences that claim nothing, JSON, tables and page."""

import io
import json
import re
from dataclasses import replace

import pytest
from finding_factory import SWAPS, TASKS, access, finding, manifest, measured, replays, study, synthetic_run
from record_factory import HOSTILE, record, scores
from rich.console import Console

from kvpress.errors import InputError
from kvpress_eval.diagnostic.report import summarize, tables, to_html, to_json
from kvpress_eval.diagnostic.report.export import plain
from kvpress_eval.diagnostic.report.head import _expected, shows_gap
from kvpress_eval.diagnostic.report.means import Mean, mean, share
from kvpress_eval.diagnostic.report.sign_rows import leverage_arms
from kvpress_eval.diagnostic.report.stages import rungs
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.records import FULL

FAST = SignSettings(repeats=4, n_permutations=20, n_studies=2)
SOME = tuple(TASKS)[:5]
FEW = {"mii": SWAPS["mii"], "blocks": SWAPS["blocks"]}
FEW_ARMS = ("snapkv", "null", "oracle", *FEW)
MOST = {name: swap for name, swap in SWAPS.items() if name not in ("unpooled", "vatp", "adakv")}
ONE = {"budgets": ["5%"], "swaps": FEW}


def report(records, **changes):
    """A summary with few arms and one budget, unless changed."""
    return summarize([(records, manifest(**{**ONE, **changes}))], settings=FAST)


def tiny(arm_scores, host_scores, full_scores, tasks=("made/one",), arm="mii@5%"):
    """Records of the full cache, the host and one arm; each a list of scores for every task."""
    return [
        one
        for task, *of_task in zip(tasks, full_scores, host_scores, arm_scores, strict=True)
        for name, values in zip((FULL, "snapkv@5%", arm), of_task, strict=True)
        for one in scores(task, name, values)
    ]


@pytest.fixture(scope="module")
def run():
    return synthetic_run(n_samples=6, tasks=SOME, arms=("snapkv", "null", "oracle", *MOST))


@pytest.fixture(scope="module")
def summary(run):
    return summarize([(run, manifest(swaps=MOST))], settings=FAST)


@pytest.fixture(scope="module")
def part(summary):
    return summary.parts[0]


def step(part, arm, budget):
    return next(each for each in part.steps if (each.arm, each.budget) == (arm, budget))


def verdict(part, arm, budget, task=None):
    return next(each for each in part.verdicts if (each.arm, each.budget, each.task) == (arm, budget, task))


def printed(summary, width, **options):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables(summary, width=width, **options))
    return console.export_text()


def test_a_mean_by_hand():
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0], "abcde")
    # standard error sqrt(2.5 / 5) = 0.70711, t(0.975; 4) = 2.77645
    assert (found.low, found.high) == pytest.approx((3 - 1.96325, 3 + 1.96325), abs=2e-3)
    assert mean([1.0, 2.0, 3.0, 4.0, 5.0], "abcde", (0.0, 4.0)).high == 4.0
    assert mean([1.0, 2.0, 3.0, 4.0], "abcd").low is None
    assert mean([2.0] * 6, "abcdef") == Mean(2.0, None, None, 6, 6)
    assert mean([], []).value is None


def test_values_of_one_cluster_are_one_draw():
    alone = mean([0.0, 1.0, 0.2, 0.8, 0.4], range(5))
    doubled = mean([0.0, 1.0, 0.2, 0.8, 0.4] * 2, [*range(5)] * 2)
    assert (doubled.low, doubled.high) == pytest.approx((alone.low, alone.high))
    assert (doubled.n, doubled.n_clusters) == (10, 5)


def test_a_share_by_hand():
    found = share([True] * 6 + [False] * 4, range(10))
    assert (found.value, found.low, found.high) == pytest.approx((60.0, 31.27, 83.18), abs=0.01)  # Wilson for 6 of 10


def test_a_step_by_hand():
    records = tiny(
        arm_scores=([1, 1, 1, 1, 0], [1, 0, 0, 0, 0]),
        host_scores=([1, 1, 0, 0, 0], [1, 0, 0, 0, 0]),
        full_scores=([1, 1, 1, 1, 1], [1, 1, 0, 0, 0]),
        tasks=("made/one", "made/two"),
    )
    part = report(records).parts[0]
    found = step(part, "mii", "5%")
    assert (found.base_score.value, found.score.value, found.difference.value) == pytest.approx((30, 50, 20))
    assert (found.n_tasks, found.difference.n, found.difference.n_clusters) == (2, 10, 10)
    assert found.p == pytest.approx(0.5)  # two samples changed: 2 of the 2^2 patterns of signs are as extreme
    assert found.shown is None
    host = next(level for level in part.levels if level.arm == "snapkv")
    assert (host.score.value, host.to_full.value) == pytest.approx((30, -40))


def test_a_change_is_shown_by_interval_and_adjusted_p():
    better = report(tiny([[1] * 12], [[0] * 12], [[1] * 12])).parts[0]
    assert step(better, "mii", "5%").shown == "better"
    worse = report(tiny([[0] * 12], [[1] * 12], [[1] * 12])).parts[0]
    assert step(worse, "mii", "5%").shown == "worse"


def test_p_is_adjusted_over_the_arms_without_the_null():
    records = [
        *tiny([[1] * 5 + [0] * 7], [[0] * 12], [[1] * 12]),
        *(one for arm in ("blocks", "oracle", "null") for one in scores("made/one", f"{arm}@5%", [0] * 11 + [1])),
    ]
    part = report(records).parts[0]
    mii = step(part, "mii", "5%")
    assert (mii.p, mii.p_adjusted) == pytest.approx((2 / 2**5, 3 * 2 / 2**5))
    assert mii.difference.excludes_zero
    assert mii.shown is None  # one of three arms, so its interval alone is no claim
    assert step(part, "null", "5%").p_adjusted == step(part, "null", "5%").p == pytest.approx(1.0)


def test_verdict_shares_by_hand():
    full = scores("made/one", FULL, [1] * 10)
    verdicts = ["access"] * 3 + ["value", "value", "fit", "undecided", "undecided"] + ["none"] * 2
    repairs = {"access": "evidence", "value": "ranking", "fit": "set"}
    arm = [
        measured(one, finding(verdict=name, replays=replays(repairs.get(name)) if name != "none" else ()))
        for one, name in zip(scores("made/one", "snapkv@5%", [0] * 8 + [1] * 2), verdicts, strict=True)
    ]
    arm[4] = measured(arm[4], finding(verdict="value", replays=replays("stored")))
    arm[7] = measured(arm[7], finding(verdict="undecided", replays=replays("evidence", chance=True)))
    row = verdict(report(full + arm).parts[0], "snapkv", "5%")
    assert (row.n, row.lost, row.replayed, row.stored) == (10, 8, 8, 1)
    assert row.counts == {"access": 3, "value": 2, "fit": 1, "undecided": 2}
    assert (row.shares["access"].value, row.shares["access"].low) == pytest.approx((37.5, 13.68), abs=0.01)  # 3 of 8
    assert (row.by_chance.value, row.by_chance.n) == (12.5, 8)


def test_answers_that_were_not_asked_for_are_lost_but_have_no_share():
    records = [*scores("made/one", FULL, [1] * 6), *scores("made/one", "snapkv@5%", [0] * 6)]
    records = [measured(one, finding(verdict=None)) if "@" in one.arm else one for one in records]
    found = report(records, measure={"attribute": []})
    row = verdict(found.parts[0], "snapkv", "5%")
    assert (row.lost, row.replayed, row.asked, row.shares["access"].value) == (6, 0, False, None)
    assert any("of snapkv were not replayed" in problem.sentence and problem.count == 6 for problem in found.problems)
    assert "Its 6 lost answers were not replayed." in " ".join(found.head)


def test_measures_by_hand_and_the_bound_of_proposition_3():
    sides = [(0.5, 0.4, 0.3), (0.9, 0.2, 0.3), (0.7, 0.4, 0.3)]
    arm = [
        measured(one, finding(access=access(tv_first=a, tv_phase=b, tv_fit=c, kept_decode=a, gold_whole=0.5)))
        for one, (a, b, c) in zip(scores("made/one", "snapkv@5%", [1] * 3), sides, strict=True)
    ]
    arm[2] = measured(arm[2], finding())
    found = report([*scores("made/one", FULL, [1] * 3), *arm])
    (row,) = found.parts[0].measures
    assert row.values["kept_decode"].value == pytest.approx((0.5 + 0.9 + 0.6) / 3)
    assert row.values["tv_bound"].value == pytest.approx((0.7 + 0.5 + 0.7) / 3)
    assert (row.values["gold_whole"].n, row.values["gold_tokens"].value) == (2, None)
    assert [one.value for one in row.by_layer["synthetic-0.5b-instruct"]] == pytest.approx([0.1, 0.3])
    assert (row.bound_holds, row.bound_n) == (2, 3)
    assert "1 measurements violate the tail-K bound" in found.problems[0].text


def test_the_access_ladder_leads_over_the_host_to_the_oracle():
    found = study().comparisons
    assert rungs(found, "snapkv", "access") == ["cumulative", "debiased", "proximal", "snapkv", "unpooled", "oracle"]
    assert rungs(found, "snapkv", "value") == ["snapkv", "vatp", "nolev", "mii"]
    assert rungs(found, "snapkv", "fit") == ["snapkv", "adakv", "blocks", "filled"]


def test_the_null_arm_stands_first_everywhere(part):
    assert part.steps[0].role == "null"
    assert part.signs.signs[0].role == "null"
    assert part.grid.arms[:2] == ["snapkv", "null"]


def test_a_transfer_says_so_wherever_it_is_shown(summary, part):
    assert {each.label for each in part.steps if each.arm == "blocks"} == {"transfer"}
    assert {each.label for each in part.steps if each.arm == "filled"} == {"diagnostic"}
    found = to_json(summary)
    assert {one["arm"]: one["label"] for one in found["comparisons"]}["blocks"] == "transfer"
    for line in printed(summary, 120, details=True).splitlines():
        assert not line.startswith("blocks ") or "transfer" in line
    page = to_html(summary)
    rows = re.findall(r'<tr[^>]*><th scope="row">blocks(.*?)</tr>', page, re.DOTALL)
    assert len(rows) >= 10
    assert all("transfer" in row for row in rows)


def test_arms_against_the_host_have_signs_and_others_have_none(part):
    arms = {row.arm for row in part.signs.signs}
    assert "debiased" not in arms  # its base is cumulative
    assert {"null", "mii", "blocks", "oracle", "cumulative"} <= arms
    of_mii = {row.budget: row.result for row in part.signs.signs if row.arm == "mii"}
    assert set(of_mii) == {None, "5%", "10%", "25%"}
    assert of_mii[None].cross_fitted.n_cells == 15
    assert of_mii["5%"].cross_fitted.n_cells == 5
    assert of_mii[None].artefact is not None
    assert of_mii["5%"].artefact is None  # simulated once, for all budgets together


def test_a_cell_by_hand():
    records = tiny([[1, 1, 1, 0, 0]], [[1, 1, 0, 0, 0]], [[1, 1, 1, 1, 0]])
    (cell,) = [row for row in report(records).parts[0].signs.cells if row.arm == "mii"]
    assert (cell.full, cell.host, cell.score, cell.margin, cell.delta) == pytest.approx((80, 40, 60, 40, 20))
    assert cell.delta_error == pytest.approx(20)  # sd of (100, 0, 0, 0, 0) is 44.72, over sqrt(5)
    assert cell.coupling is None


def test_leverage_needs_nolev_and_mii_around_the_host(part):
    assert leverage_arms(part.grid) == ("nolev", "mii")
    assert part.signs.leverage[0].result.n_cells == 15
    assert report(synthetic_run(n_samples=5, tasks=SOME, arms=FEW_ARMS, budgets=["5%"])).parts[0].signs.leverage == []


def test_trajectories_need_three_budgets(run, part):
    assert {row.arm for row in part.signs.trajectories} == {row.arm for row in part.signs.signs}
    two = [one for one in run if one.budget != "25%" and (one.arm == FULL or one.contract in FEW_ARMS)]
    found = report(two, budgets=["5%", "10%"])
    assert found.parts[0].signs.trajectories == []
    assert "needs 3 budgets; this study has 2" in to_html(found)


def test_boundary_means_are_over_the_samples_that_were_looked_at(part):
    row = next(each for each in part.exchanges if (each.arm, each.budget) == ("mii", "5%"))
    assert row.n == 15  # every second one of 30 samples
    assert row.advantage.value == pytest.approx(row.gain.value - row.chance.value)
    idle = next(each for each in part.exchanges if (each.arm, each.budget) == ("null", "5%"))
    assert (idle.chance.value, idle.near.value, idle.improved.value) == (None, None, None)
    assert {each.ranking for each in part.units} == {"snapkv", "null", "vatp", "nolev", "mii"}


def test_coupling_is_the_manifests_or_not_known(run, summary, part):
    phi = {row.task: row.phi for row in part.signs.couplings}
    assert phi == {task: TASKS[task][2] for task in SOME}
    few = [one for one in run if (one.arm == FULL or one.contract in FEW_ARMS) and one.budget in (None, "5%")]
    unknown = report(few, coupling=False)
    assert {row.phi for row in unknown.parts[0].signs.couplings} == {None}
    assert "not known" in printed(unknown, 100, details=True)
    assert "not known" in to_html(unknown)
    assert any("no coupling in the manifest" in problem.sentence for problem in unknown.problems)


def test_two_models_are_one_study_of_twice_the_answers_on_the_same_clusters(run):
    few = [one for one in run if (one.arm == FULL or one.contract in FEW_ARMS) and one.budget in (None, "5%")]
    both = summarize([(few, manifest(model="a/x", **ONE)), (few, manifest(model="b/y", **ONE))], settings=FAST)
    one, two = (step(found.parts[0], "oracle", "5%").difference for found in (report(few), both))
    assert (two.n, two.n_clusters, two.value) == (2 * one.n, one.n_clusters, pytest.approx(one.value))
    assert (two.low, two.high) == pytest.approx((one.low, one.high))  # the same answers again are no new evidence
    assert {row.key.model for row in both.parts[0].signs.cells} == {"a/x", "b/y"}
    assert both.head[0].startswith("a/x and b/y, query-aware")


def test_what_does_nothing_is_not_claimed_to_do_anything():
    records = synthetic_run(n_samples=6, tasks=SOME, arms=FEW_ARMS, budgets=["5%"], strength=0.0)
    found = report(records)
    said = " ".join(found.head)
    assert "loses" not in said
    assert "At 5 % no difference of snapkv" in said
    assert "access: none of 1 shown; value: none of 1 shown; fit: none of 1 shown" in said
    assert "not shown" in said or "no interval" in said


def test_what_is_shown_is_said_with_its_interval(summary, part):
    host = next(level for level in part.levels if (level.arm, level.budget) == ("snapkv", "5%"))
    loss = f"{-host.to_full.value:.1f} points [{-host.to_full.high:.1f}, {-host.to_full.low:.1f}]"
    assert f"At 5 % snapkv loses {loss} of the full cache's" in summary.head[1]
    cumulative = step(part, "cumulative", None)
    assert cumulative.shown == "worse"
    assert f"cumulative −{-cumulative.difference.value:.1f} [" in " ".join(summary.head)


def test_a_gap_is_shown_only_beyond_zero_and_what_no_effect_gives(part):
    row = next(row for row in part.signs.signs if (row.arm, row.budget) == ("mii", None))
    null_range = replace(row.result.artefact.cross_fitted["rate_gap"], expected=10.0)

    def with_gap(low, high):
        gap = replace(row.result.cross_fitted.rate_gap, value=20.0, low=low, high=high)
        artefact = replace(row.result.artefact, cross_fitted={"rate_gap": null_range})
        split = replace(row.result.cross_fitted, rate_gap=gap)
        return replace(row, result=replace(row.result, cross_fitted=split, artefact=artefact))

    assert shows_gap(with_gap(12.0, 40.0)) is True
    assert shows_gap(with_gap(5.0, 40.0)) is False
    assert shows_gap(with_gap(-5.0, 40.0)) is False
    assert shows_gap(with_gap(-9.0, -1.0)) is True
    assert shows_gap(with_gap(None, None)) is None


def test_an_artefact_is_no_part_of_a_smaller_gap():
    assert _expected(18.0, 22.0) == "of which +18 are expected"
    assert _expected(35.0, 5.0) == "where +35 are expected"
    assert _expected(9.0, -4.0) == "where +9 are expected"


def test_failing_samples_are_spread_and_say_how_to_see_more(summary):
    found = summary.failures
    assert len(found) == 12
    verdicts = [failure.verdict for failure in found]
    assert verdicts == sorted(verdicts, key=["access", "value", "fit", "undecided"].index)
    assert set(verdicts) == {"access", "value", "fit", "undecided"}
    assert len({failure.arm.partition("@")[0] for failure in found}) >= 6
    assert found[0].arm.startswith("snapkv@")
    first = found[0]
    assert first.command == f"kvpress diagnose explain RUN {first.task}/{first.sample} --arm {first.arm}"
    assert "stage I access" in first.sentence


def test_names_in_commands_are_quoted():
    full = scores("made/one; rm", FULL, [1.0])
    arm = [
        measured(scores("made/one; rm", "snapkv@5%", [0.0])[0], finding(verdict="access", replays=replays("evidence")))
    ]
    (failure,) = report(full + arm).failures
    assert failure.command == "kvpress diagnose explain RUN 'made/one; rm/0' --arm snapkv@5%"


def test_problems_name_what_is_missing(run):
    few = [one for one in run if (one.arm == FULL or one.contract in FEW_ARMS) and one.budget in (None, "5%")]
    few = [one for one in few if (one.task, one.sample, one.contract) != (SOME[0], "2", "mii")]
    few = [one.model_copy(update={"measures": {}}) if one.contract == "null" else one for one in few]
    few.append(record(SOME[0], "0", "stranger@5%"))
    said = " ".join(problem.text for problem in report(few).problems)
    assert "31 records have no finding" in said
    assert "1 records are of arms that the study does not name" in said
    assert "and are compared without these: mii 1" in said


def test_a_task_that_the_full_cache_cannot_do_is_named():
    records = tiny([[0] * 6, [1] * 6], [[0] * 6, [1] * 6], [[0] * 6, [1] * 6], tasks=("made/hard", "made/easy"))
    said = [problem.text for problem in report(records).problems if "floor" in problem.sentence]
    assert len(said) == 1
    assert said[0].startswith("1 tasks are at the floor")
    assert said[0].endswith(": made/hard")


def test_modes_are_apart_and_in_the_order_of_the_study():
    modes = ["query_aware", "query_agnostic"]
    records = synthetic_run(n_samples=5, tasks=SOME[:2], arms=FEW_ARMS, budgets=["5%"], modes=modes)
    found = report(records, modes=modes)
    assert [part.mode for part in found.parts] == modes
    assert all(row.key.mode == part.mode for part in found.parts for row in part.signs.cells)
    alone = report([one for one in records if one.mode == "query_aware"])
    assert alone.parts[0].steps == found.parts[0].steps


def test_cells_that_cannot_be_split_are_named():
    found = report(synthetic_run(n_samples=3, tasks=SOME[:2], arms=FEW_ARMS, budgets=["5%"]))
    said = " ".join(problem.text for problem in found.problems)
    assert "none of 2 cells has 4 clusters" in said
    assert "changes have no interval" in said
    assert all(row.result is None for row in found.parts[0].signs.signs)
    assert "too few clusters for an interval" in found.head[1]


def test_a_null_arm_that_does_something_is_a_problem():
    records = [*tiny([[1] * 12], [[1] * 12], [[1] * 12]), *scores("made/one", "null@5%", [0] * 12)]
    found = report(records)
    assert any(problem.sentence.startswith("the null arm moves the score at 5 %") for problem in found.problems)
    assert "outside of its expectation" in found.head[-1]


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ([], "give the folder of one or more"),
        ([([], manifest(**ONE))], "no records yet"),
        ([([record()], {"run": record().run})], "names no sweep"),
        ([([record()], manifest(host=None, swaps=None) | {"sweep": {"model": "m", "tasks": [{"task": "toy/one"}]}})], "`kvpress eval report` shows it"),
        ([([record(arm="snapkv@5%")], manifest(**ONE))], "no records of the arm 'full'"),
        ([([record()], manifest(**ONE))], "no records of any arm of its study"),
        ([([record(run="x")], manifest(**ONE))], "records of another run"),
        ([([record()], manifest(**ONE) | {"coupling": {"t": 2}})], "from 0 to 1"),
        ([([record(measures={"heads": 1})], manifest(**ONE))], "no finding of this version"),
        ([([record()], manifest(model=name, **ONE)) for name in "aa"], "two of the runs are of the model 'a'"),
        ([([record()], manifest(model="a", **ONE)), ([record()], manifest(model="b", **{**ONE, "host": "h2o"}))], "another, 'h2o'"),
        ([([record()], manifest(model="a", **ONE)), ([record()], manifest(model="b", **{**ONE, "swaps": {}}))], "different arms, such as 'blocks'"),
        (
            [([record()], manifest(model="a", **ONE)), ([record()], manifest(model="b", **{**ONE, "swaps": {**FEW, "mii": {"swap": {"ranking": "nolev"}}}}))],
            "arm 'mii' is not the same contract",
        ),
    ],
    ids=["none", "empty", "no sweep", "plain sweep", "no full cache", "full alone", "another run", "phi", "finding", "model twice", "hosts", "arms", "contracts"],
)  # fmt: skip
def test_what_is_no_study_is_refused_in_one_sentence(runs, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        summarize(runs, settings=FAST)
    assert "\n" not in str(caught.value)


def test_json_is_strict_and_every_number_has_its_interval_and_n(summary):
    found = json.loads(json.dumps(to_json(summary), allow_nan=False))
    part = found["modes"]["query_aware"]
    wanted = {
        "levels",
        "steps",
        "measures",
        "verdicts",
        "exchanges",
        "units",
        "signs",
        "cells",
        "leverage",
        "trajectories",
    }
    assert wanted <= part.keys()
    for row in part["steps"]:
        assert {"value", "low", "high", "n", "n_clusters"} == row["difference"].keys()
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
    for row in part["measures"]:
        assert all(one.keys() >= {"value", "low", "high", "n"} for one in row["values"].values())
    assert part["cells"][0]["key"].keys() == {"task", "length", "model", "budget", "mode"}
    assert found["head"] == summary.head
    assert plain({"a": (float("nan"), float("inf"), 1.5)}) == {"a": [None, None, 1.5]}


def test_the_same_run_gives_the_same_report(run):
    few = [one for one in run if (one.arm == FULL or one.contract in FEW_ARMS) and one.budget in (None, "5%")]
    assert to_json(report(few[::-1])) == to_json(report(few))


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_their_terminal(summary, width):
    text = printed(summary, width, details=width == 100)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "stage ladder at all budgets" in text


@pytest.mark.parametrize(
    ("records", "changes"),
    [
        (scores("made/one", FULL, [1.0]) + scores("made/one", "snapkv@5%", [0.0]), {}),
        (tiny([[0] * 6], [[0] * 6], [[0] * 6]), {}),
        (synthetic_run(n_samples=5, tasks=SOME[:1], arms=FEW_ARMS, budgets=["5%"], modes=("query_aware", "query_agnostic")), {}),
        (
            [
                one.model_copy(update={"budget": "512tokens", "arm": "snapkv@512tokens"}) if one.budget == "10%" else one
                for one in synthetic_run(n_samples=5, tasks=SOME[:1], arms=("snapkv",), budgets=["5%", "10%"])
            ],
            {"budgets": ["5%", 512]},
        ),
        (scores("made/$x_{1", FULL, [1.0] * 6, length=None) + scores("made/$x_{1", "snapkv@5%", [0.5] * 6, length=None), {"coupling": False}),
    ],
    ids=["one answer", "nothing solved", "two modes", "two kinds of budget", "odd names"],
)  # fmt: skip
def test_small_and_odd_runs_have_a_page_and_tables(records, changes):
    found = report(records, **changes)
    page = to_html(found)
    assert page.count("<h2") == 12
    assert not re.search(r"\b(nan|None|inf)\b", page.partition('id="manifest"')[0])
    assert "None" not in printed(found, 100, details=True)


def test_a_hostile_run_stays_text():
    odd = {"prediction": HOSTILE, "question": HOSTILE, "answers": ("</pre><img>",)}
    full = scores("made/<b>one", FULL, [1.0] * 5, **odd)
    arm = [
        measured(one, finding(verdict="access", replays=replays("evidence")))
        for one in scores("made/<b>one", "snapkv@5%", [0.0] * 5, **odd)
    ]
    given = manifest(model="<img src=x>\u202e", coupling=False, **ONE) | {"note": "</pre><script>alert(1)</script>"}
    page = to_html(summarize([(full + arm, given)], settings=FAST))
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert" in page
    assert "<img" not in page
    assert "<b>one" not in page
    assert "\u202e" not in page
