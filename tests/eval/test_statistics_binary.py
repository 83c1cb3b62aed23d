"""McNemar, Wilson, Tango, Holm and Benjamini-Hochberg: against scipy, by hand, by brute force over the likelihood."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpress_eval.statistics import benjamini_hochberg, holm, mcnemar, tango, wilson


@pytest.mark.parametrize(("lost", "gained"), [(0, 1), (3, 1), (10, 0), (7, 12), (60, 40)])
def test_mid_p_is_the_exact_p_less_half_the_seen_outcome(lost, gained):
    exact = scipy.stats.binomtest(lost, lost + gained, 0.5).pvalue
    point = scipy.stats.binom.pmf(lost, lost + gained, 0.5)
    assert mcnemar(lost, gained) == pytest.approx(exact - point)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(4, 4) == 1.0
    assert mcnemar(5, 0) == pytest.approx(1 / 32)  # 2 * (1/32) - 1/32


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_knows_no_sides(lost, gained):
    assert mcnemar(lost, gained) == mcnemar(gained, lost)
    assert 0 < mcnemar(lost, gained) <= 1


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (50, 50), (197, 500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(hits, n, confidence):
    reference = scipy.stats.binomtest(hits, n).proportion_ci(confidence_level=confidence, method="wilson")
    assert wilson(hits, n, confidence) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize(("n", "lower"), [(50, 92.9), (100, 96.3), (200, 98.1), (500, 99.2)])
def test_all_of_n_is_not_certainty(n, lower):
    assert round(100 * wilson(n, n)[0], 1) == lower


def score_statistic(lost, gained, n, difference):
    """Tango's statistic with the constrained rates found by maximising the trinomial likelihood numerically."""

    def negative_likelihood(lost_rate):
        gained_rate = lost_rate + difference
        same = 1 - lost_rate - gained_rate
        counts, rates = np.array([lost, gained, n - lost - gained]), np.array([lost_rate, gained_rate, same])
        return -float(counts @ np.log(np.clip(rates, 1e-12, 1)))

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    lost_rate = scipy.optimize.minimize_scalar(
        negative_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-10}
    ).x
    return (gained - lost - n * difference) / np.sqrt(n * (2 * lost_rate + difference - difference**2))


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 2, 50), (3, 1, 10), (1, 0, 200), (8, 11, 44)])
def test_tango_is_where_the_score_test_turns(lost, gained, n):
    low, high = tango(lost, gained, n)
    assert score_statistic(lost, gained, n, low) == pytest.approx(1.959964, abs=1e-3)
    assert score_statistic(lost, gained, n, high) == pytest.approx(-1.959964, abs=1e-3)


@pytest.mark.parametrize("n", [10, 50, 500])
def test_no_discordant_pair_keeps_a_width(n):
    z2 = 1.959964**2
    assert tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-6)


def test_everything_lost_is_not_certainty():
    low, high = tango(10, 0, 10)
    assert low == -1.0
    assert -0.8 < high < -0.4
    assert tango(0, 10, 10) == pytest.approx((-high, 1.0))


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 60))
def test_tango_contains_the_estimate_and_mirrors(lost, gained, same):
    n = lost + gained + same
    low, high = tango(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert tango(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)
    inner = tango(lost, gained, n, 0.90)
    assert low < inner[0]
    assert inner[1] < high


def test_tango_covers():
    random, covered = np.random.default_rng(5), 0
    for lost, gained, _ in random.multinomial(40, [0.08, 0.03, 0.89], size=400):
        low, high = tango(int(lost), int(gained), 40)
        covered += low <= -0.05 <= high
    assert 0.92 <= covered / 400 <= 0.995


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        tango(4, 4, 7)
    with pytest.raises(ValueError, match="no items"):
        wilson(0, 0)


def test_holm_by_hand():
    # sorted: 0.01*4, 0.02*3, 0.03*2 -> raised to 0.06, 0.5*1
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.021, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])  # never below a smaller p's
    assert holm([]) == []


p_values = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(p_values)
def test_benjamini_hochberg_is_scipys(values):
    reference = scipy.stats.false_discovery_control(values, method="bh")
    assert benjamini_hochberg(values) == pytest.approx(reference.tolist())


@given(p_values)
def test_adjusted_values_are_never_smaller(values):
    for raw, screened, claimed in zip(values, benjamini_hochberg(values), holm(values), strict=True):
        assert raw <= screened + 1e-12
        assert screened <= claimed + 1e-12
        assert claimed <= 1
