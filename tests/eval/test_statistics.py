"""Pairs, choice of interval, macro averages, verdicts, retention and the noise floor: cases computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_factory import record, scores

from kvpress.errors import InputError
from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.statistics import Estimate, Pairs, macro_estimate, noise_floor, pair, retention, verdict
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
    ("difference", "lower", "upper", "p", "expected"),
    [
        (0.0, -0.009, 0.01, 1.0, "no loss"),
        (0.0, -0.01, 0.01, 1.0, "undecided"),  # not above the margin
        (0.0, -0.28, 0.28, 1.0, "undecided"),  # p = 1 is no evidence of equality
        (-0.2, -0.3, -0.1, 0.001, "loss"),
        (-0.2, -0.3, -0.1, 0.06, "undecided"),  # does not survive the number of comparisons
        (-0.2, -0.4, 0.1, 0.001, "undecided"),  # a worst-case bound that reaches over zero
        (0.2, -0.02, 0.4, 0.001, "undecided"),
        (-0.005, -0.008, -0.002, 0.001, "no loss"),  # a certain loss, and a certainly small one
        (-0.2, None, None, None, "undecided"),
    ],
)
def test_verdicts(difference, lower, upper, p, expected):
    assert verdict(difference, lower, upper, p, 0.01) == expected


def test_a_margin_of_nothing_is_refused():
    with pytest.raises(ValueError, match="positive"):
        verdict(0.0, 0.0, 0.0, 1.0, 0.0)


def test_claims_of_no_loss_are_seldom_wrong_at_the_margin():
    """True loss exactly the margin: "no loss" may be said in about one study of twenty."""
    random, claims = np.random.default_rng(2), 0
    for number in range(300):
        arm = 0.5 - 0.03 + random.normal(0, 0.1, 60)
        lower = Estimate([Stratum.of(arm - 0.5, range(60))], (-1.0, 1.0), (number,), n_resamples=400).interval(0.9).low
        claims += verdict(0.0, lower, 1.0, 1.0, 0.03) == "no loss"
    assert 0.02 <= claims / 300 <= 0.09


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
    assert 0 <= floor.low < 0.25 < floor.high


def test_two_equal_full_runs_do_not_show_that_there_is_no_noise():
    full, repeat = scores("made/one", FULL, [1.0] * 10), scores("made/one", FULL_REPEAT, [1.0] * 10)
    floor = noise_floor(pair(full, repeat), 1.0)
    assert floor.mean_abs == 0
    assert floor.high > 0.25
