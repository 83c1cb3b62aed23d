"""The size of the artefact: against simulated studies whose artefact is known, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sign_studies import right_or_wrong, study

from kvpress_eval.diagnostic.artefact import _redraw, _under_null, simulate, true_margins
from kvpress_eval.diagnostic.crossfit import Study
from kvpress_eval.diagnostic.sign_settings import SignSettings

MARGIN, DELTA = ("full", "host"), ("arm", "host")


def expected(make, n, **options):
    """Means over runs: [raw, cross-fitted] x [observed, expected] of rate gap, mean gap and r."""
    found = []
    for seed in range(n):
        one = Study.of(make(np.random.default_rng([seed, 8]), **options), MARGIN, DELTA, 4)
        sizes = simulate(one, SignSettings(repeats=5, n_studies=10), seed)
        found.append(
            [
                [
                    [getattr(split[name], field) for name in ("rate_gap", "mean_gap", "correlation")]
                    for field in ("observed", "expected")
                ]
                for split in (sizes.raw, sizes.cross_fitted)
            ]
        )
    return np.array(found, dtype=float).mean(axis=0)


def test_without_effect_the_expected_gap_is_the_one_seen():
    raw, crossed = expected(study, 20)
    assert raw[1] == pytest.approx([30.4, 3.15, 0.45], rel=0.1)
    assert raw[0] == pytest.approx(raw[1], rel=0.15)
    assert crossed[1] == pytest.approx([0, 0, 0], abs=0.9)


def test_with_an_effect_it_stays_what_it_is_without():
    raw, crossed = expected(study, 20, beta=0.8)
    assert raw[1] == pytest.approx([30.4, 3.15, 0.45], rel=0.15)
    assert raw[0][0] > raw[1][0] + 5
    assert crossed[0][0] > crossed[1][0] + 3


@pytest.mark.parametrize(("spread", "noise", "gap"), [(4.0, 1.0, 11), (0.0, 3.0, 34)])
def test_it_follows_noise_and_spread(spread, noise, gap):
    """The ends of the published analysis: gaps of 11 to 38 points."""
    assert expected(study, 12, spread=spread, noise=noise)[0][1][0] == pytest.approx(gap, abs=3)


def test_with_right_or_wrong_scores_it_is_rough_but_there():
    one = [Study.of(right_or_wrong(np.random.default_rng([5, n])), MARGIN, DELTA, 4) for n in range(8)]
    found = [simulate(each, SignSettings(repeats=5, n_studies=10), n) for n, each in enumerate(one)]
    assert np.mean([each.raw["win_gap"].expected for each in found]) > 20
    assert np.mean([each.cross_fitted["rate_gap"].expected for each in found]) > 5  # ties by task
    assert abs(np.mean([each.cross_fitted["win_gap"].expected for each in found])) < 3


def test_true_margins_have_the_variance_that_the_noise_leaves():
    rng = np.random.default_rng(0)
    true = rng.normal(2, 1.5, 4000)
    noise = rng.uniform(1, 9, 4000)
    found = true_margins(true + rng.normal(0, np.sqrt(noise)), noise)
    assert found.mean() == pytest.approx(2, abs=0.15)
    assert found.std() == pytest.approx(1.5, abs=0.12)
    assert true_margins(np.array([1.0, 2, 3]), np.full(3, 50.0)).tolist() == [2, 2, 2]  # nothing but noise
    assert true_margins(np.array([1.0, 2, 3]), np.zeros(3)).tolist() == [1, 2, 3]


def test_a_redrawn_study_keeps_single_differences_but_for_their_sign():
    cells = right_or_wrong(np.random.default_rng(0), n_tasks=3)
    one = Study.of(cells, MARGIN, DELTA, 4)
    blocks, wanted = _under_null(one)
    rng = np.random.default_rng(1)
    means = []
    for _ in range(3000):
        again = _redraw(blocks[0], wanted[blocks[0].cells], rng)
        assert set(np.unique(np.abs(again.second))) <= set(np.unique(np.abs(blocks[0].second)))
        means.append([again.whole()[0][:, 0], again.whole()[1][:, 0]])
    margins, deltas = np.mean(means, axis=0)
    assert margins == pytest.approx(wanted[blocks[0].cells], abs=0.6)  # points
    assert deltas == pytest.approx(np.zeros(4), abs=0.6)


def test_a_coin_exchanges_host_and_arm_of_a_cluster():
    """Without a change of the true margin, each cluster is (m, d) as seen or, exchanged, (full - arm, host - arm) =
    (m - d, -d)."""
    one = Study.of(study(np.random.default_rng(0), n_tasks=1, n_cells=1), MARGIN, DELTA, 4)
    seen = one.blocks[0]
    (block,), _ = _under_null(one)
    again = _redraw(block, block.whole()[0][:, 0], np.random.default_rng(1))
    pairs = list(zip(seen.first[0], seen.second[0], strict=True))
    known = np.array([*pairs, *((m - d, -d) for m, d in pairs)])
    kinds = [
        int(np.abs(known - each).sum(axis=1).argmin()) for each in zip(again.first[0], again.second[0], strict=True)
    ]
    redrawn = np.array([again.first[0], again.second[0]]).T
    assert redrawn == pytest.approx(known[kinds])
    assert len({kind < 12 for kind in kinds}) == 2  # some exchanged, some not


def test_a_range_holds_the_middle_of_the_studies():
    one = Study.of(study(np.random.default_rng(2)), MARGIN, DELTA, 4)
    found = simulate(one, SignSettings(repeats=3, n_studies=60), 0).raw["rate_gap"]
    wide = simulate(one, SignSettings(repeats=3, n_studies=60, confidence=0.999), 0).raw["rate_gap"]
    assert found.n_studies == 60
    assert wide.low < found.low < found.expected < found.high < wide.high
    assert found.expected == wide.expected
