"""Signs: every number against a count by hand or by brute force, intervals against leaving tasks out one by one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import scipy.stats
from published_diagnostic import cell, keys
from pydantic import ValidationError
from sign_studies import study

from kvpress_eval.diagnostic.cells import CellKey
from kvpress_eval.diagnostic.crossfit import Draws, Study
from kvpress_eval.diagnostic.label_permutation import permute_labels
from kvpress_eval.diagnostic.leave_out import leave_one_task_out
from kvpress_eval.diagnostic.margins import classes, delta, is_favourable, margin
from kvpress_eval.diagnostic.quantity import mean_over_cells, quantity
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.signs import evaluate
from kvpress_eval.diagnostic.tally import measured, tally

FAST = SignSettings(repeats=3, n_studies=0, n_permutations=100)


def random_draws(seed=0, n_cells=40, n_draws=6, n_tasks=7):
    rng = np.random.default_rng(seed)
    values = np.round(rng.normal(0, 1.2, (2, n_cells, n_draws)))  # whole numbers, so that many tie
    return Draws(values[0], values[1], rng.permutation(np.arange(n_cells) % n_tasks))


def test_margins_deltas_and_classes():
    one = cell(CellKey("t", None, "m", "5%", "q"), full=43.0, host=40.0, arm=39.0)
    assert (margin(one, "host"), delta(one, "host", "arm")) == (3, -1)
    values = np.array([0.2, 0.1, 1e-9, 0, -0.1, -0.2])
    assert classes(values, 0.1).tolist() == [1, 0, 0, 0, 0, -1]
    assert is_favourable(values, 1e-6).tolist() == [True, True, False, False, False, False]


def test_every_number_by_brute_force():
    draws = random_draws()
    m, d = draws.first.ravel(), draws.second.ravel()
    total = tally(draws, 1e-6).total()
    up, down, tie = m > 0, m < 0, m == 0
    assert float(total.rate_gap) == pytest.approx(100 * ((d[up] > 0).mean() - (d[~up] > 0).mean()))
    assert float(total.mean_gap) == pytest.approx(d[up].mean() - d[~up].mean())
    assert float(total.match) == pytest.approx(100 * ((m > 0) == (d > 0)).mean())
    assert float(total.match_of_classes) == pytest.approx(100 * (np.sign(m) == np.sign(d)).mean())
    wins = (1 + np.sign(d)) / 2
    assert float(total.win_gap) == pytest.approx(100 * (wins[up].mean() - wins[down].mean()))
    assert float(total.correlation) == pytest.approx(scipy.stats.pearsonr(m, d)[0])
    assert float(total.share("tie", (-1,))) == pytest.approx(100 * (d[tie] < 0).mean())
    assert float(total.cells("unfavourable")) == pytest.approx((~up).sum() / 6)


def test_thresholds_leave_out_what_lies_between():
    draws = random_draws()
    m, d = draws.first.ravel(), draws.second.ravel()
    total = tally(draws, 1e-6, 1.0).total()
    up, down = m > 1, m <= -1
    assert float(total.rate_gap) == pytest.approx(100 * ((d[up] > 0).mean() - (d[down] > 0).mean()))
    assert float(total.cells("all")) == pytest.approx((up | down).sum() / 6)
    assert float(total.cells("tie")) == 0
    kept = up | down
    assert float(total.correlation) == pytest.approx(scipy.stats.pearsonr(m[kept], d[kept])[0])


def test_a_tolerance_makes_ties():
    draws = Draws(np.array([[0.4], [0.6]]), np.array([[-0.4], [0.6]]), np.array([0, 0]))
    total = tally(draws, 0.5).total()
    assert total.counts.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_leaving_a_task_out_is_counting_without_it():
    draws = random_draws()
    without = tally(draws, 1e-6).without_each()
    for task in range(7):
        chosen = draws.task != task
        alone = tally(draws.only(chosen), 1e-6).total()
        assert float(without.rate_gap[task]) == pytest.approx(float(alone.rate_gap))
        assert float(without.correlation[task]) == pytest.approx(float(alone.correlation))


def test_the_jackknife_of_equal_tasks_is_the_t_interval_of_their_means():
    values = np.random.default_rng(1).normal(size=24)
    found = mean_over_cells("points", values, np.repeat(np.arange(8), 3))
    means = values.reshape(8, 3).mean(axis=1)
    low, high = scipy.stats.t.interval(0.95, 7, means.mean(), scipy.stats.sem(means))
    assert (found.value, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert (found.n_cells, found.n_tasks) == (24, 8)


def test_a_share_has_wilsons_interval():
    hits = np.array([1.0] * 9 + [0.0] * 3) * 100
    found = mean_over_cells("share", hits, np.arange(12))
    z, rate = scipy.stats.t.ppf(0.975, 11), 0.75
    error = np.sqrt(rate * (1 - rate) / 11)  # the jackknife's, of twelve tasks with one cell each
    n = rate * (1 - rate) / error**2
    ends = np.roots([1 + z**2 / n, -2 * rate - z**2 / n, rate**2])  # (p - rate)^2 = z^2 p (1 - p) / n
    assert sorted([found.low, found.high]) == pytest.approx(sorted(100 * ends))


def test_all_alike_is_not_certainty():
    share = mean_over_cells("share", np.full(10, 100.0), np.arange(10))
    assert share.high == 100
    assert 50 < share.low < 80
    points = mean_over_cells("points", np.zeros(10), np.arange(10))
    assert (points.value, points.low, points.high) == (0, None, None)


def test_no_interval_below_five_tasks_in_a_group():
    values = np.random.default_rng(0).normal(size=12)
    assert mean_over_cells("points", values, np.arange(12) % 4).low is None
    assert mean_over_cells("points", values, np.arange(12) % 5).low is not None
    weights = np.array([[3, 1], [3, 1], [3, 1], [3, 1], [3, 0], [3, 0]], float)
    few = quantity("gap", 10.0, np.array([9.0, 11, 10, 12, 10, 8]), weights)
    assert (few.value, few.low, few.n_tasks) == (10, None, 4)
    assert quantity("gap", float("nan"), np.zeros(6), np.ones((6, 1))).value is None


def test_a_group_in_few_of_many_tasks_has_fewer_degrees_of_freedom():
    left_out = np.array([9.0, 11, 10, 12, 10, 8])
    even, uneven = np.ones((6, 2)), np.ones((6, 2))
    uneven[0, 1] = 20.0
    assert quantity("gap", 10.0, left_out, uneven).low < quantity("gap", 10.0, left_out, even).low


def test_the_interval_of_r_is_fishers():
    draws = random_draws(n_tasks=10)
    found = measured(tally(draws, 1e-6), "correlation", lambda t: t.correlation, ("all",), 0.95)
    each = [
        scipy.stats.pearsonr(draws.first[draws.task != t].ravel(), draws.second[draws.task != t].ravel())[0]
        for t in range(10)
    ]
    z = np.arctanh(each)
    error = np.sqrt(0.9 * ((z - z.mean()) ** 2).sum())
    half = scipy.stats.t.ppf(0.975, 9) * error
    centre = np.arctanh(found.value)
    assert (found.low, found.high) == pytest.approx((np.tanh(centre - half), np.tanh(centre + half)), rel=1e-6)


def test_the_entry_point_gives_plain_json_and_repeats_itself():
    cells = study(np.random.default_rng(0), n_tasks=6, n_cells=4)
    settings = SignSettings(repeats=3, n_studies=3, n_permutations=50)
    first = dataclasses.asdict(evaluate(cells, "host", "arm", settings=settings, seed=4))
    assert first == dataclasses.asdict(evaluate(cells, "host", "arm", settings=settings, seed=4))
    assert first != dataclasses.asdict(evaluate(cells, "host", "arm", settings=settings, seed=5))
    plain = json.loads(json.dumps(first, allow_nan=False))
    assert plain["raw"]["rate_gap"]["n_cells"] == 24
    assert plain["settings"]["repeats"] == 3
    assert [each["threshold"] for each in plain["thresholds"]] == [0, 0.1, 0.25, 0.5]
    assert plain["thresholds"][0]["raw"]["rate_gap"] == plain["raw"]["rate_gap"]
    assert plain["coupling"] == {"low": None, "high": None, "n_unknown": 24}


def test_p_values_belong_to_the_raw_groups():
    rows = [(3, 1)] * 8 + [(3, -1)] * 2 + [(-3, 0)] * 3 + [(-3, 1)] * 2
    cells = [cell(k, full=40 + m, host=40, arm=40 + d) for k, (m, d) in zip(keys(15), rows, strict=True)]
    found = evaluate(cells, "host", "arm", settings=FAST)
    assert found.raw.favourable.p == pytest.approx(56 / 1024)  # 10 over 8, 9 and 10
    assert found.raw.unfavourable.p == pytest.approx(0.5)  # a tied delta does as predicted
    assert found.raw.table[2].match.value == 0  # of classes a tie matches a tie alone
    assert found.raw.table[2].p == 1
    assert found.raw.table[1].p is None
    assert found.cross_fitted.favourable.p is None


def test_a_group_without_cells_has_no_numbers():
    cells = [cell(k, full=43, host=40, arm=40 + n % 3) for n, k in enumerate(keys(36))]
    raw = evaluate(cells, "host", "arm", settings=FAST).raw
    assert raw.unfavourable.n_cells == 0
    assert raw.unfavourable.positive.value is None
    assert raw.rate_gap.value is None
    assert raw.without_task[0].change is None


def test_settings_are_checked():
    with pytest.raises(ValidationError):
        SignSettings(repeats=0)
    with pytest.raises(ValidationError):
        SignSettings(min_clusters=1)
    with pytest.raises(ValidationError):
        SignSettings(unknown=1)


def test_leave_one_task_out_puts_the_task_first_that_makes_the_gap():
    rows = [("a", 1, -1), ("a", -1, -1), ("b", 1, 1), ("b", -1, 1), ("c", 1, 1), ("c", -1, -1)]
    draws = Draws(
        np.array([[m] for _, m, _ in rows], float), np.array([[d] for *_, d in rows], float), np.arange(6) // 2
    )
    found = leave_one_task_out(tally(draws, 1e-6), ["a", "b", "c"])
    assert found[0].task == "c"
    assert [found[0].rate_gap, found[0].change] == pytest.approx([0, -100 / 3])  # 2/3 - 1/3 with it, 1/2 - 1/2 without
    assert {each.task: each.rate_gap for each in found} == pytest.approx({"a": 50, "b": 50, "c": 0})


def strata_keys(n, n_models=2):
    return [CellKey(f"t{i}", None, f"m{i % n_models}", "5%", "q") for i in range(n)]


def test_shuffling_labels_is_hypergeometric():
    """One stratum of 6 and 4 margins, 5 and 5 deltas: the number of favourable cells with a positive delta is
    hypergeometric."""
    m = np.array([1.0] * 6 + [-1.0] * 4)[:, None]
    d = np.array([1.0] * 5 + [-1.0] * 5)[:, None]
    one = Draws(m, d, np.arange(10))
    found = permute_labels(one, strata_keys(10, 1), 1e-6, np.random.default_rng(0), n_permutations=40_000)
    both = scipy.stats.hypergeom(10, 6, 5)
    matches = {hits: 10 * (2 * hits - 1) for hits in range(6)}  # hits + (5 - (6 - hits)) of 10
    assert found.observed == matches[5] == 90
    assert found.expected == pytest.approx(sum(both.pmf(k) * matches[k] for k in range(1, 6)), abs=0.3)
    assert found.p == pytest.approx(both.pmf(5), abs=0.003)
    assert (found.low, found.high) == (10 * (2 * both.ppf(0.025) - 1), 10 * (2 * both.ppf(0.975) - 1))


def test_labels_stay_within_their_model_and_budget():
    """If margins and deltas only differ between models, shuffling within them changes nothing."""
    m = np.where(np.arange(20) % 2 == 0, 1.0, -1.0)[:, None]
    found = permute_labels(
        Draws(m, m, np.arange(20)), strata_keys(20), 1e-6, np.random.default_rng(0), n_permutations=200
    )
    assert (found.observed, found.expected, found.p) == (100, 100, 1)


def test_p_counts_the_seen_labels_as_one_of_the_shuffles():
    m = np.sign(np.arange(40) % 2 - 0.5)[:, None]
    one = Draws(m, m, np.arange(40))
    found = permute_labels(one, strata_keys(40, 1), 1e-6, np.random.default_rng(0), n_permutations=50)
    assert found.p == pytest.approx(1 / 51)


def test_shuffling_does_not_remove_the_artefact():
    """Studies without effect: raw, the permutation test rejects far too often; cross-fitted it does not."""
    rejected = []
    for seed in range(60):
        one = Study.of(study(np.random.default_rng([9, seed]), n_tasks=10), ("full", "host"), ("arm", "host"), 4)
        rng = np.random.default_rng(seed)
        rejected.append(
            [
                permute_labels(draws, one.keys, 1e-6, rng, n_permutations=200).p < 0.05
                for draws in (one.raw(), one.cross_fitted(10, seed))
            ]
        )
    raw, crossed = np.mean(rejected, axis=0)
    assert raw > 0.6
    assert crossed < 0.17
