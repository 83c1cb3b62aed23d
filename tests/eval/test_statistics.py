"""Pairs, choice of interval, macro averages, verdicts, retention and the noise floor: cases computed by hand."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from record_factory import record, scores

from kvpress.errors import InputError
from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.statistics import (
    Estimate,
    Interval,
    Pairs,
    holm,
    macro_estimate,
    noise_floor,
    pair,
    retention,
    verdict,
    within_noise,
)
from kvpress_eval.statistics.retention import effective_size, threshold
from kvpress_eval.statistics.strata import Stratum

ARM = "snapkv@25%"


def pairs(full, arm, clusters=None):
    names = tuple(str(index) for index in range(len(full)))
    return Pairs(names, tuple(clusters) if clusters else names, np.array(arm, float), np.array(full, float))


def test_pairing_goes_by_sample_id_and_counts_what_is_missing():
    full = [record(sample=name, score=score) for name, score in (("a", 1.0), ("b", 0.0), ("c", 0.5))]
    arm = [record(sample=name, arm=ARM, score=score) for name, score in (("d", 1.0), ("c", 0.25), ("a", 0.0))]
    found = pair(full, arm)
    assert found.samples == ("a", "c")
    assert found.arm.tolist() == [0.0, 0.25]
    assert found.full.tolist() == [1.0, 0.5]
    assert (found.unpaired_full, found.unpaired_arm) == (1, 1)
    assert found.differences.mean == pytest.approx(-0.625)


def test_a_sample_asked_twice_differently_is_refused():
    with pytest.raises(InputError, match="two different prompts"):
        pair([record(prompt_sha="a")], [record(arm=ARM, prompt_sha="b")])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=20), st.sampled_from([0.0, 1.0]))
def test_a_pair_that_agrees_changes_neither_side(outcomes, same):
    full, arm = [float(a) for a, _ in outcomes], [float(b) for _, b in outcomes]
    before, after = pairs(full, arm), pairs([*full, same], [*arm, same])
    assert (before.lost, before.gained) == (after.lost, after.gained)


@pytest.mark.parametrize(
    ("full", "arm", "clusters", "rule"),
    [
        ([1, 1, 0, 1], [1, 0, 0, 1], None, "none"),  # four items
        ([1] * 10, [1] * 10, None, "tango"),
        ([1] * 10, [0] * 10, None, "tango"),
        ([1] * 10, [1] * 10, "aabbccddee", "bounded"),  # pairs of items that belong together
        ([0.5] * 10, [0.5] * 10, None, "bounded"),
        ([0.5] * 10, [0.25] * 10, None, "bounded"),
        ([0.5] * 10, [0.1, 0.2] + [0.5] * 8, None, "bounded"),
        ([0.5] * 10, [0.1, 0.2, 0.6] + [0.5] * 7, None, "bootstrap"),
        ([0.5] * 10, [0.1] * 10, "aaabbbcccc", "none"),  # three clusters
    ],
)
def test_which_interval_is_given(full, arm, clusters, rule):
    estimate = Estimate.of_differences(pairs(full, arm, clusters))
    assert estimate.rule == rule
    interval = estimate.interval()
    if rule == "none":
        assert interval.low is None
        return
    assert interval.low <= estimate.mean <= interval.high
    assert interval.high - interval.low > 0.1  # ten items never know better


def test_rates_get_wilsons_interval():
    estimate = Estimate.of_scores([1.0] * 10, [str(index) for index in range(10)])
    assert estimate.rule == "wilson"
    assert estimate.interval().low == pytest.approx(10 / (10 + 1.959964**2))


def test_a_macro_average_counts_tasks_and_not_items():
    many, few = pairs([1] * 40, [1] * 40), pairs([1] * 5, [0] * 5)
    estimate = macro_estimate({"a": many, "b": few})
    assert estimate.mean == -0.5  # by items it would be -5/45
    with pytest.raises(ValueError, match="pairs in each"):
        macro_estimate({"a": many, "b": pairs([], [])})


def test_the_macro_interval_is_that_of_the_sum_of_its_tasks():
    random = np.random.default_rng(0)
    tasks = {str(index): pairs(np.full(50, 0.6), 0.6 + random.normal(0, 0.1 * (index + 1), 50)) for index in range(4)}
    interval = macro_estimate(tasks).interval()
    errors = [(task.arm - task.full).std(ddof=1) / 50**0.5 for task in tasks.values()]
    expected = 1.97 * np.sqrt(np.sum(np.square(errors))) / 4
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.06)


def test_a_macro_average_over_a_task_of_few_clusters_has_no_interval():
    tasks = {"a": pairs([1] * 40, [1] * 40), "b": pairs([1] * 4, [0] * 4)}
    assert macro_estimate(tasks).interval().low is None


@pytest.mark.parametrize(
    ("difference", "upper", "p_loss", "p_no_loss", "expected"),
    [
        (0.0, 0.01, 1.0, 0.049, "no loss"),
        (0.0, 0.01, 1.0, 0.05, "undecided"),
        (0.0, 0.28, 1.0, 1.0, "undecided"),  # p = 1 is no evidence of equality
        (-0.2, -0.1, 0.001, 1.0, "loss"),
        (-0.2, -0.1, 0.06, 1.0, "undecided"),  # does not survive the number of comparisons
        (-0.2, 0.1, 0.001, 1.0, "undecided"),  # a worst-case bound that reaches over zero
        (0.2, 0.4, 0.001, 0.3, "undecided"),
        (-0.005, -0.002, 0.001, 0.01, "no loss"),  # a certain loss, and a certainly small one
        (-0.2, None, None, None, "undecided"),
    ],
)
def test_verdicts(difference, upper, p_loss, p_no_loss, expected):
    assert verdict(difference, upper, p_loss, p_no_loss) == expected


def test_p_of_no_loss_of_binary_items_is_tangos_score_test():
    # no pair differs: the statistic at -margin is margin * sqrt(n) / sqrt(margin (1 - margin)), by hand
    full = [1.0] * 200
    p = Estimate.of_differences(pairs(full, full)).p_no_loss(0.03)
    assert p == pytest.approx(scipy.stats.norm.sf(np.sqrt(200 * 0.03 / 0.97)), rel=1e-3)


def test_claims_of_no_loss_are_seldom_wrong_at_the_margin():
    """True loss exactly the margin: a single "no loss" may be said in about one study of twenty."""
    random, claims = np.random.default_rng(2), 0
    for number in range(200):
        arm = 0.5 - 0.03 + random.normal(0, 0.1, 60)
        estimate = Estimate([Stratum.of(arm - 0.5, range(60))], (-1.0, 1.0), (number,), n_resamples=400)
        claims += estimate.lower_bound() > -0.03
    assert 0.02 <= claims / 200 <= 0.09


def test_ten_arms_at_the_margin_seldom_get_a_claim_among_them():
    """True losses exactly the margin: without Holm a third of such tables held a false "no loss"."""
    random, claims, alone, tables = np.random.default_rng(3), 0, 0, 40
    for table in range(tables):
        found = []
        for arm in range(10):
            values = -0.03 + random.normal(0, 0.1, 40)
            estimate = Estimate([Stratum.of(values, range(40))], (-1.0, 1.0), (table, arm), n_resamples=1000)
            found.append(estimate.p_no_loss(0.03))
        claims += min(holm(found)) < 0.05
        alone += min(found) < 0.05
    assert claims / tables <= 0.125
    assert alone / tables >= 0.25


def test_retention_ignores_lucky_gains():
    found = retention(pairs([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1]), threshold("ruler_part"))
    assert (found.solved, found.kept, found.share) == (4, 3, 0.75)
    assert found.low == pytest.approx(0.3006, abs=1e-4)  # Wilson, 3 of 4
    assert found.high == pytest.approx(0.9544, abs=1e-4)


def test_what_counts_as_solved_follows_the_metric():
    graded = pairs([0.75, 0.5, 0.4, 1.0], [0.6, 0.2, 0.9, 1.0])
    assert retention(graded, threshold("qa_f1-firstline")).solved == 3
    assert retention(graded, threshold("qa_f1-firstline")).kept == 2
    assert retention(graded, threshold("ruler_all")).solved == 1
    assert retention(pairs([0, 0], [1, 1]), threshold("count")).share is None


def test_clustered_retention_knows_less():
    together = pairs([1] * 12, [1] * 6 + [0] * 6, "aaabbbcccddd")
    alone = pairs([1] * 12, [1] * 6 + [0] * 6)
    clustered, single = retention(together, 1.0), retention(alone, 1.0)
    assert clustered.high - clustered.low > single.high - single.low
    assert effective_size(Stratum.of([1.0] * 6 + [0.0] * 6, "aaabbbcccddd")) == 4
    assert effective_size(Stratum.of([1.0] * 12, "aaabbbcccddd")) == 4
    assert effective_size(Stratum.of([1.0, 0.0] * 6, "aabbccddeeff")) == 6


def test_noise_floor_by_hand():
    full = scores("made/one", FULL, [1.0, 0.0, 1.0, 0.5, 0.5, 1.0])
    repeat = scores("made/one", FULL_REPEAT, [1.0, 1.0, 0.5, 0.5, 0.5, 1.0])
    floor = noise_floor(pair(full, repeat), threshold("ruler_all"))
    assert (floor.n, floor.changed, floor.flips) == (6, 2, 2)
    assert floor.mean_abs == pytest.approx(0.25)
    assert floor.difference == pytest.approx(1 / 12)
    assert floor.difference_interval.low < 1 / 12 < floor.difference_interval.high
    assert 0 <= floor.low < 0.25 < floor.high


def test_two_equal_full_runs_do_not_show_that_there_is_no_noise():
    full, repeat = scores("made/one", FULL, [1.0] * 10), scores("made/one", FULL_REPEAT, [1.0] * 10)
    floor = noise_floor(pair(full, repeat), 1.0)
    assert floor.mean_abs == 0
    assert floor.high > 0.25


def test_within_noise_is_inside_the_interval_of_enough_repeats():
    interval = Interval(-0.05, 0.02)
    assert within_noise(-0.05, 20, interval) is True
    assert within_noise(-0.051, 20, interval) is False
    assert within_noise(0.03, 20, interval) is False
    assert within_noise(0.0, 19, interval) is None
    assert within_noise(0.0, 20, Interval(None, None)) is None
