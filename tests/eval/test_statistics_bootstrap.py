"""Bootstrap, sign flips and bounded intervals: against scipy, by brute force, by simulated studies."""

import itertools

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress_eval.statistics.bootstrap import Bootstrap
from kvpress_eval.statistics.bounded import Bounded
from kvpress_eval.statistics.distributions import student_quantile
from kvpress_eval.statistics.interval import Estimate
from kvpress_eval.statistics.permutation import sign_flip
from kvpress_eval.statistics.strata import Stratum, generator


def rng(seed=0):
    return np.random.default_rng(seed)


def rows(values):
    """Every value a cluster of its own."""
    return Stratum.of(values, range(len(values)))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_without_clusters_it_is_scipys_bootstrap(method):
    values = rng(3).gamma(1.0, 0.2, size=40) - 0.1  # skewed, so that bias and acceleration matter
    ours = Bootstrap.of([rows(values)], rng(1), n_resamples=40_000)
    theirs = scipy.stats.bootstrap((values,), np.mean, method=method, n_resamples=40_000, rng=rng(2))
    for end, reference in zip(ours.interval(0.95, method, widen=False), theirs.confidence_interval, strict=True):
        assert end == pytest.approx(reference, abs=0.03 * values.std())


def test_two_strata_are_scipys_two_samples():
    first, second = rng(4).gamma(1.0, 0.2, size=12), rng(5).gamma(2.0, 0.1, size=30)
    ours = Bootstrap.of([rows(first), rows(second)], rng(1), n_resamples=40_000)
    theirs = scipy.stats.bootstrap(
        (first, second),
        lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
        method="BCa",
        n_resamples=40_000,
        rng=rng(2),
    )
    assert ours.interval(0.95, "bca", widen=False) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)


def test_clusters_of_unequal_size_by_enumeration():
    values, clusters = [0.0, 0.4, -0.2, 0.6, 0.6, 0.1], ["a", "a", "a", "b", "b", "c"]
    groups = [[0.0, 0.4, -0.2], [0.6, 0.6], [0.1]]
    every = [np.mean(list(itertools.chain(*pick))) for pick in itertools.product(groups, repeat=3)]
    bootstrap = Bootstrap.of([Stratum.of(values, clusters)], rng(), n_resamples=30_000)
    for share in (0.05, 0.3, 0.5, 0.8, 0.95):
        exact = float(np.mean(np.array(every) <= np.quantile(every, share) + 1e-9))
        assert np.mean(bootstrap.draws <= np.quantile(every, share) + 1e-9) == pytest.approx(exact, abs=0.015)


def test_widening_turns_ten_normal_values_into_the_t_interval():
    values = rng(11).normal(size=10)
    low, high = Bootstrap.of([rows(values)], rng(), n_resamples=40_000).interval(0.95, "percentile")
    half = scipy.stats.t.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
    assert (high - low) / 2 == pytest.approx(half, rel=0.12)
    plain = Bootstrap.of([rows(values)], rng(), n_resamples=40_000).interval(0.95, "percentile", widen=False)
    assert (plain[1] - plain[0]) / 2 < 0.9 * half
    # between the two: a normal quantile 1.96 with divisor n, and Student's 2.262 with divisor n - 1
    assert (high - low) / (plain[1] - plain[0]) == pytest.approx(2.262 / 1.960 * np.sqrt(10 / 9), rel=0.03)


def test_strata_pool_their_degrees_of_freedom():
    values = rng(3).normal(size=10)
    two = Bootstrap.of([rows(values), rows(values + 1)], rng(), n_resamples=100)
    assert two.freedom == pytest.approx(18)
    assert two.inflation == pytest.approx(np.sqrt(10 / 9))
    uneven = Bootstrap.of([rows(values), rows(0.001 * values)], rng(), n_resamples=100)
    assert uneven.freedom == pytest.approx(9, rel=1e-4)


@pytest.mark.parametrize("freedom", [4, 4.7, 9, 30, 1000])
@pytest.mark.parametrize("probability", [0.025, 0.05, 0.5, 0.95, 0.975])
def test_student_quantiles(probability, freedom):
    expected = scipy.special.stdtrit(freedom, probability)
    assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_a_bootstrap_without_variance_is_refused():
    with pytest.raises(ValueError, match="do not vary"):
        Bootstrap.of([rows([0.2] * 8)], rng())
    with pytest.raises(ValueError, match="two clusters"):
        Bootstrap.of([Stratum.of([0.1, 0.2], ["a", "a"])], rng())


@pytest.mark.parametrize("n", [5, 10, 60])
def test_nothing_changed_is_clopper_and_pearsons_bound(n):
    low, high = Bounded.of([rows([0.0] * n)], (-1.0, 1.0), rng()).interval(0.90)
    exact = scipy.stats.binomtest(0, n).proportion_ci(confidence_level=0.90, method="exact").high
    assert high == pytest.approx(exact, rel=0.01)
    assert low == pytest.approx(-exact, rel=0.01)


def test_few_changes_are_clopper_and_pearsons_bound():
    values = [1.0, 1.0] + [0.0] * 18
    _, high = Bounded.of([rows(values)], (0.0, 1.0), rng(), n_draws=40_000).interval(0.90)
    exact = scipy.stats.binomtest(2, 20).proportion_ci(confidence_level=0.90, method="exact")
    assert high == pytest.approx(exact.high, abs=0.005)


def test_strata_without_changes_share_their_bound():
    _, high = Bounded.of([rows([0.0] * 10)] * 13, (-1.0, 1.0), rng()).interval(0.90)
    assert high == pytest.approx(1 - 0.05 ** (1 / 130), rel=0.01)


def test_a_common_difference_leaves_room_on_both_sides():
    low, high = Bounded.of([rows([-0.5] * 10)], (-1.0, 1.0), rng()).interval(0.90)
    unseen = 1 - 0.05 ** (1 / 10)
    assert low == pytest.approx(-0.5 - 0.5 * unseen, rel=0.01)
    assert high == pytest.approx(-0.5 + 1.5 * unseen, rel=0.01)


@pytest.mark.parametrize("n", [6, 30])
def test_sign_flips_against_scipy(n):
    differences = rng(n).normal(0.1, 0.3, size=n)
    reference = scipy.stats.permutation_test(
        (differences, np.zeros(n)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=20_000, rng=rng(1),
    )  # fmt: skip
    assert sign_flip([rows(differences)], rng()) == pytest.approx(reference.pvalue, abs=1e-9 if n == 6 else 0.015)


def test_sign_flips_move_whole_clusters():
    values, clusters = [0.5] * 12, ["a"] * 6 + ["b"] * 6
    assert sign_flip([Stratum.of(values, clusters)], rng()) == pytest.approx(0.5)  # ++ and -- of four patterns
    assert sign_flip([rows(values)], rng()) == pytest.approx(2 / 2**12)
    assert sign_flip([rows([0.0] * 9)], rng()) == 1.0


def test_sign_flips_of_a_macro_average_weigh_tasks_not_items():
    # task means 0.3, -0.1, 0.2: of the eight patterns, four reach |0.4|; by items (0.3, -0.9, 0.2) all would
    strata = [Stratum.of([0.3], ["a"]), Stratum.of([-0.1] * 9, ["b"] * 9), Stratum.of([0.2], ["c"])]
    assert sign_flip(strata, rng()) == pytest.approx(0.5)


def test_a_report_can_be_made_again():
    assert generator(0, "task", 4096).random() == generator(0, "task", 4096).random()
    assert generator(0, "task", 4096).random() != generator(0, "task", 8192).random()
    assert generator(0, "task", 4096).random() != generator(1, "task", 4096).random()


def studies(count, *, clusters=20, size=5):
    """Paired differences with a strong effect of the cluster; the true mean is -0.1."""
    random = rng(7)
    for _ in range(count):
        common = random.normal(0, 0.25, clusters).repeat(size)
        yield -0.1 + common + random.normal(0, 0.15, clusters * size), np.arange(clusters).repeat(size)


def test_clustered_intervals_cover_and_row_intervals_do_not():
    clustered = naive = 0
    for number, (values, clusters) in enumerate(studies(300)):
        for names, by_row in ((clusters, False), (range(len(values)), True)):
            estimate = Estimate([Stratum.of(values, names)], (-2.0, 2.0), (number,), n_resamples=500)
            interval = estimate.interval()
            covered = interval.low <= -0.1 <= interval.high
            naive += covered and by_row
            clustered += covered and not by_row
    assert 0.91 <= clustered / 300 <= 0.985
    assert naive / 300 < 0.75


def test_intervals_of_sparse_changes_cover():
    covered = 0
    for number in range(200):
        random = rng(number)
        values = np.where(random.random(10) < 0.1, -random.random(10), 0.0)  # true mean -0.05
        interval = Estimate([rows(values)], (-1.0, 1.0), (number,), n_resamples=500).interval()
        covered += interval.low <= -0.05 <= interval.high
    assert covered / 200 >= 0.95


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.0, 0.1, 1.0]), min_size=5, max_size=30),
    st.integers(1, 3),
    st.sampled_from(["percentile", "bca"]),
)
def test_every_interval_contains_its_estimate_and_has_a_width(values, size, method):
    stratum = Stratum.of(values, [index // size for index in range(len(values))])
    estimate = Estimate([stratum], (-1.0, 1.0), (), method=method, n_resamples=300)
    wide, narrow = estimate.interval(0.95), estimate.interval(0.9)
    if stratum.n_clusters < 5:
        assert wide.low is None
        assert wide.high is None
        return
    assert -1 <= wide.low <= narrow.low <= estimate.mean <= narrow.high <= wide.high <= 1
    assert wide.high > wide.low


def test_p_of_no_loss_is_where_the_bound_meets_the_margin():
    values = rng(5).normal(0, 0.1, 60)
    values += -0.02 - values.mean()
    estimate = Estimate([rows(values)], (-1.0, 1.0), ())
    p = estimate.p_no_loss(0.04)
    assert 0.01 < p < 0.2
    assert estimate.lower_bound(p * 1.02) > -0.04 >= estimate.lower_bound(p * 0.98)
    t = (values.mean() + 0.04) / (values.std(ddof=1) / np.sqrt(60))
    assert p == pytest.approx(scipy.stats.t.sf(t, 59), abs=0.02)
    assert estimate.p_no_loss(0.01) == 1.0  # the mean itself is a larger loss
    with pytest.raises(ValueError, match="positive"):
        estimate.p_no_loss(0.0)
    assert Estimate([rows(values[:4])], (-1.0, 1.0), ()).p_no_loss(0.04) is None


@pytest.mark.parametrize(
    ("values", "rule"), [([0.01, 0.02, 0.03, 0.04, 0.05] * 8, "bootstrap"), ([0.0] * 500, "bounded")]
)
def test_p_of_no_loss_is_never_smaller_than_its_draws_can_tell(values, rule):
    estimate = Estimate([rows(values)], (-1.0, 1.0), (), n_resamples=1000)
    assert estimate.rule == rule
    assert 1 / 1000 <= estimate.p_no_loss(0.5) < 0.01


@pytest.mark.parametrize(
    ("shape", "n"), [((0.15, 3.0), 10), ((0.15, 3.0), 20), ((0.15, 3.0), 29), ((0.3, 0.7), 10), ((0.3, 0.7), 29)]
)
def test_skewed_losses_of_the_size_of_the_margin_are_seldom_called_none(shape, n):
    """True loss exactly the margin; a bootstrap would say "no loss" in up to a quarter of these studies."""
    random, margin, claims, studies = rng(n), shape[0] / sum(shape), 0, 100
    for number in range(studies):
        estimate = Estimate([rows(-random.beta(*shape, n))], (-1.0, 1.0), (number,), n_resamples=500)
        claims += estimate.lower_bound() > -margin
    assert claims / studies <= 0.05


def test_a_few_graded_items_can_still_show_a_loss_to_be_small():
    values = -rng(1).beta(0.3, 0.7, 25) * 0.1
    assert Estimate([rows(values)], (-1.0, 1.0), ()).p_no_loss(0.3) < 0.05
