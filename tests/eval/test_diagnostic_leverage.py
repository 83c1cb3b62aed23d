"""Leverage: cells of which every kind is known, and what sharing a host does to agreement."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from published_diagnostic import cell, keys
from sign_studies import study

from kvpress.errors import InputError
from kvpress_eval.diagnostic.leverage import leverage
from kvpress_eval.diagnostic.sign_settings import SignSettings

FAST = SignSettings(repeats=10)
#: (NoLev - host, MII - host), and what it is
KINDS = [
    ((-1, 1), {"rescues", "residual_match", "opposite"}),
    ((0, 1), {"rescues", "residual_match"}),
    ((1, -1), {"breaks", "residual_match", "opposite"}),
    ((1, 0), {"breaks", "residual_match"}),
    ((2, 1), {"taxes", "agreement"}),
    ((1, 2), {"agreement", "residual_match"}),
    ((1, 1), {"agreement"}),
    ((-1, -2), {"support_failures", "agreement", "residual_match"}),
    ((-2, -1), {"support_failures", "agreement"}),
    ((0, 0), {"support_failures", "agreement", "residual_match"}),
]
COUNTS = ("agreement", "opposite", "residual_match", "rescues", "breaks", "taxes", "support_failures")


@pytest.mark.parametrize(("lifts", "kinds"), KINDS)
def test_each_kind(lifts, kinds):
    one = cell(next(keys(1)), host=40.0, nolev=40.0 + lifts[0], mii=40.0 + lifts[1])
    raw = leverage([one], "host", "nolev", "mii", settings=FAST).raw
    assert {name for name in COUNTS if getattr(raw, name).cells == 1} == kinds
    assert all(getattr(raw, name).cells in (0, 1) for name in COUNTS)


def test_counts_shares_and_means():
    cells = [
        cell(key, host=40.0, nolev=40.0 + KINDS[n % 10][0][0], mii=40.0 + KINDS[n % 10][0][1])
        for n, key in enumerate(keys(60))
    ]
    found = leverage(cells, "host", "nolev", "mii", settings=FAST)
    assert (found.n_cells, found.wins, found.losses, found.ties) == (60, 30, 18, 12)
    assert found.raw.rescues.cells == pytest.approx(12)
    assert found.raw.rescues.share.value == pytest.approx(20)
    assert found.raw.rescues.share.low < 20 < found.raw.rescues.share.high
    assert found.mean_nolev.value == pytest.approx(0.2)
    assert found.mean_mii.value == pytest.approx(0.2)
    assert found.mean_residual.value == pytest.approx(0, abs=1e-9)
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_cross_fitted_agreement_is_chance_where_nothing_helps():
    """Host, NoLev and MII of independent noise: over one host the lifts agree in 2 of 3 cells, over disjoint halves
    in half."""
    raw, crossed = [], []
    for seed in range(12):
        cells = [
            dataclasses.replace(each, scores={**each.scores, "nolev": each.scores["full"]})
            for each in study(np.random.default_rng(seed), mean=0.0, spread=0.0)
        ]
        found = leverage(cells, "host", "nolev", "arm", settings=FAST, seed=seed)
        raw.append(found.raw.agreement.share.value)
        crossed.append(found.cross_fitted.agreement.share.value)
    assert np.mean(raw) == pytest.approx(200 / 3, abs=4)
    assert np.mean(crossed) == pytest.approx(50, abs=3)


def test_a_missing_arm_is_an_error():
    with pytest.raises(InputError, match="no scores of contract 'nolev'"):
        leverage([cell(next(keys(1)), host=40.0, mii=41.0)], "host", "nolev", "mii")
