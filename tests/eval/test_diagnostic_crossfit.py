"""Cross-fitting: halves never share a sample, are nearly equal, and take the shared host's noise out of signs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sign_studies import right_or_wrong, study

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Cell, CellKey
from kvpress_eval.diagnostic.crossfit import Study, split
from kvpress_eval.diagnostic.tally import measured, tally

BOTH = ("favourable", "unfavourable")
MARGIN, DELTA = ("full", "host"), ("arm", "host")
N_STUDIES = 500


def one_cell(task="t", n=4, clusters=None, budget="5%", **scores):
    names = tuple(str(number) for number in range(n))
    key = CellKey(task, None, "m", budget, "query_aware")
    return Cell(key, names, clusters or names, {name: np.array(each, float) for name, each in scores.items()})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=15), st.integers(0, 10_000))
def test_halves_are_nearly_equal_and_never_empty(sizes, seed):
    counts = np.array(sizes, float)
    first = split(counts, 20, np.random.default_rng(seed)) @ counts
    assert (np.abs(2 * first - counts.sum()) <= counts.max()).all()
    assert (first > 0).all()
    assert (first < counts.sum()).all()


def test_every_balanced_split_is_as_likely():
    halves = split(np.ones(4), 60_000, np.random.default_rng(0))
    seen, counts = np.unique(halves, axis=0, return_counts=True)
    assert len(seen) == 6
    assert counts == pytest.approx(10_000, rel=0.05)


def test_margin_and_delta_share_no_sample():
    """Powers of two as scores: a sum says which samples are in it."""
    weights = 2.0 ** np.arange(6)
    of_margin = one_cell(n=6, full=weights, host=np.zeros(6), arm=weights)
    draws = Study.of([of_margin], MARGIN, DELTA, 4).cross_fitted(40, 0)
    first, second = (np.rint(3 * each[0]).astype(int) for each in (draws.first, draws.second))
    assert ((first & second) == 0).all()
    assert ((first | second) == 63).all()
    assert len(set(first.tolist())) == 20  # 6 over 3
    assert set(first.tolist()) == set(second.tolist())  # both ways round


def test_clusters_stay_whole():
    weights = 2.0 ** np.arange(6)
    clusters = ("a", "b", "a", "c", "d", "b")
    cell = one_cell(n=6, clusters=clusters, full=weights, host=np.zeros(6), arm=np.zeros(6))
    block = Study.of([cell], MARGIN, DELTA, 4).blocks[0]
    assert block.sizes.tolist() == [2, 2, 1, 1]
    assert block.first[0].tolist() == [1 + 4, 2 + 32, 8, 16]


def test_cells_over_the_same_samples_are_split_alike_whatever_else_is_there():
    weights = 2.0 ** np.arange(8)
    cells = [one_cell(n=8, budget=b, full=weights, host=np.zeros(8), arm=weights) for b in ("5%", "10%")]
    other = one_cell("other", n=8, full=weights, host=np.zeros(8), arm=weights)
    alone = Study.of(cells[:1], MARGIN, DELTA, 4).cross_fitted(10, 3)
    together = Study.of([other, *cells], MARGIN, DELTA, 4).cross_fitted(10, 3)
    assert (together.first[1] == together.first[2]).all()
    assert (together.first[1] == alone.first[0]).all()
    assert (together.first[0] != alone.first[0]).any()
    assert (alone.first != Study.of(cells[:1], MARGIN, DELTA, 4).cross_fitted(10, 4).first).any()


def test_cells_that_cannot_be_split_are_named():
    small = one_cell("small", n=3, full=[1, 2, 3], host=[0, 0, 0], arm=[1, 1, 1])
    few = one_cell("few", n=6, clusters=("a", "a", "b", "b", "c", "c"), full=range(6), host=range(6), arm=range(6))
    large = one_cell("large", n=4, full=range(4), host=range(4), arm=range(4))
    found = Study.of([small, few, large], MARGIN, DELTA, 4)
    assert [key.task for key in found.keys] == ["large"]
    assert [each.key.task for each in found.left_out] == ["small", "few"]
    assert found.left_out[1].reason.startswith("3 clusters of samples, 4 are needed")
    with pytest.raises(InputError, match="run more samples"):
        Study.of([small], MARGIN, DELTA, 4)
    with pytest.raises(InputError, match="no scores of contract 'mii'"):
        Study.of([large], MARGIN, ("mii", "host"), 4)


def test_the_pooled_product_of_halves_is_the_unbiased_one():
    """Over all splits, mean of m_A d_B is (sum_i m_i sum_j d_j - sum_i m_i d_i) / (n (n - 1)): no sample meets
    itself."""
    rng = np.random.default_rng(0)
    full, host, arm = rng.normal(size=(3, 10))
    draws = Study.of([one_cell(n=10, full=full, host=host, arm=arm)], MARGIN, DELTA, 4).cross_fitted(40_000, 0)
    m, d = full - host, arm - host
    expected = (m.sum() * d.sum() - (m * d).sum()) / 90
    assert (draws.first * draws.second).mean() == pytest.approx(expected, abs=0.005)
    assert abs(m.mean() * d.mean() - expected) > 0.05  # which the raw product is not


def gaps(cells, seed):
    """(value, low, high) of rate gap and of r, raw and cross-fitted."""
    one = Study.of(cells, MARGIN, DELTA, 4)
    found = []
    for draws in (one.raw(), one.cross_fitted(10, seed)):
        sums = tally(draws, 1e-6)
        for kind, number, groups in (
            ("gap", lambda t: t.rate_gap, BOTH),
            ("points", lambda t: t.mean_gap, BOTH),
            ("correlation", lambda t: t.correlation, ("all",)),
            ("gap", lambda t: t.win_gap, ("positive", "negative")),
        ):
            each = measured(sums, kind, number, groups, 0.95)
            found.append([each.value, each.low, each.high])
    return np.array(found, dtype=float)


def covers_zero(intervals):
    return ((intervals[..., 1] <= 0) & (intervals[..., 2] >= 0)).mean(axis=0)


@pytest.fixture(scope="module")
def null_studies():
    return np.array([gaps(study(np.random.default_rng([1, n])), n) for n in range(N_STUDIES)])


def test_without_an_effect_the_raw_split_shows_one(null_studies):
    """The published analysis: about 60.7 against 30.4 %, r about 0.45."""
    rate, _, r, _ = null_studies[:, :4].transpose(1, 0, 2)
    assert rate[:, 0].mean() == pytest.approx(60.7 - 30.4, abs=1.5)
    assert r[:, 0].mean() == pytest.approx(0.45, abs=0.02)
    assert covers_zero(null_studies)[0] < 0.4
    assert covers_zero(null_studies)[2] < 0.05


def test_without_an_effect_the_cross_fitted_intervals_cover_zero_at_the_nominal_rate(null_studies):
    rate, mean, r, _ = null_studies[:, 4:].transpose(1, 0, 2)
    assert abs(rate[:, 0].mean()) < 1
    assert abs(mean[:, 0].mean()) < 0.15
    assert abs(r[:, 0].mean()) < 0.015
    for coverage in covers_zero(null_studies)[4:]:
        assert 0.92 <= coverage <= 0.98  # nominal 0.95; two standard errors of 500 studies are 0.02


@pytest.mark.parametrize(("n_tasks", "n_cells"), [(8, 6), (5, 6)])
def test_few_tasks_cover_too(n_tasks, n_cells):
    found = [gaps(study(np.random.default_rng([2, n]), n_tasks=n_tasks, n_cells=n_cells), n)[4:] for n in range(150)]
    coverage = covers_zero(np.array(found))
    assert ((coverage >= 0.91) & (coverage <= 0.99)).all(), coverage


def test_a_planted_effect_is_found_by_both():
    """delta = 0.5 margin, sd 1.5 a score. The sign: in all studies raw, in 95 % or more cross-fitted."""
    found = np.array([gaps(study(np.random.default_rng([3, n]), beta=0.5, noise=1.5), n) for n in range(100)])
    assert (found[:, [0, 2], 0] > 0).mean(axis=0).tolist() == [1, 1]
    assert ((found[:, [4, 6], 0] > 0).mean(axis=0) >= 0.95).all()
    assert (found[:, 6, 1] > 0).mean() >= 0.4  # the whole interval of r
    assert found[:, 4, 0].mean() == pytest.approx(10.9, abs=2)  # halves show less than the truth, not more


def test_where_ties_go_by_task_the_rate_gap_is_off_and_the_win_gap_is_not():
    found = np.array([gaps(right_or_wrong(np.random.default_rng([4, n])), n) for n in range(150)])
    assert np.nanmean(found[:, 4, 0]) > 6
    assert abs(np.nanmean(found[:, 7, 0])) < 2
    known = ~np.isnan(found[:, 7, 1])
    assert known.mean() > 0.8
    assert 0.94 <= covers_zero(found[known])[7] <= 1
