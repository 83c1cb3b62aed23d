"""Trajectories over budgets: shapes by hand, the oracle's winner's curse, budgets that have no order."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from published_diagnostic import cell

from kvpress.errors import InputError
from kvpress_eval.diagnostic.cells import Cell, CellKey
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.trajectories import by_size, trajectories

FAST = SignSettings(repeats=20)
BUDGETS = ("5%", "10%", "25%")


def cells_of(shapes, budgets=BUDGETS):
    """One trajectory a task; budgets are given largest first, so that sorting matters."""
    return [
        cell(CellKey(f"t{task}", None, "m", budget, "q"), host=40.0, arm=40.0 + value)
        for task, shape in enumerate(shapes)
        for budget, value in reversed(list(zip(budgets, shape, strict=True)))
    ]


def test_shapes():
    shapes = [(1, 2, 3), (3, 2, 2), (1, 1, 1), (2, 1, 3), (1, 3, 2)]
    found = trajectories(cells_of(shapes), "arm", "host", settings=FAST)
    assert found.budgets == BUDGETS
    assert [one.values for one in found.each] == [pytest.approx(shape) for shape in shapes]
    assert [(one.rising, one.falling, one.dips) for one in found.each] == [
        (True, False, ()),
        (False, True, ()),
        (True, True, ()),
        (False, False, ("10%",)),
        (False, False, ()),
    ]
    assert (found.n, found.rising, found.falling, found.n_monotone) == (5, 2, 2, 3)
    assert [at.dips for at in found.at_budget] == [0, 1, 0]
    assert [at.best for at in found.at_budget] == [2, 2, 3]
    assert found.best_fixed == "25%"
    assert found.share_of_oracle == pytest.approx(100 * (11 / 5) / (13 / 5))
    assert found.monotone.value == 60
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_only_a_strict_dip_is_one():
    found = trajectories(cells_of([(1, 1, 2), (2, 1, 1), (2, 1, 2)]), "arm", "host", settings=FAST)
    assert [one.dips for one in found.each] == [(), (), ("10%",)]


def test_a_difference_within_the_tolerance_is_flat():
    wide = SignSettings(repeats=2, tolerance=0.5)
    found = trajectories(cells_of([(1.0, 0.8, 1.1)]), "arm", "host", settings=wide).each[0]
    assert (found.rising, found.falling, found.dips) == (True, True, ())


def test_an_oracle_without_gain_has_no_share():
    found = trajectories(cells_of([(-3, -2, -1)]), "arm", "host", settings=FAST)
    assert found.oracle.value == pytest.approx(-1)
    assert found.share_of_oracle is None


def test_the_disjoint_oracle_has_no_winners_curse():
    rng = np.random.default_rng(0)
    names = tuple(map(str, range(20)))
    cells = [
        Cell(
            CellKey(f"t{task}", None, "m", budget, "q"),
            names,
            names,
            {"host": np.full(20, 40.0), "arm": 40 + rng.normal(0, 20, 20)},
        )
        for task in range(200)
        for budget in BUDGETS
    ]
    found = trajectories(cells, "arm", "host", settings=FAST)
    assert found.oracle.value > 3  # 0.85 standard errors of 4.5 points
    assert abs(found.oracle_disjoint.value) < 1
    assert found.oracle_disjoint.low < 0 < found.oracle_disjoint.high


def test_incomplete_trajectories_are_named():
    cells = cells_of([(1, 2, 3), (1, 2, 3)])[:-1]
    found = trajectories(cells, "arm", "host", settings=FAST)
    assert found.n == 1
    assert {(each.key.task, each.key.budget) for each in found.left_out} == {("t1", "25%"), ("t1", "10%")}
    assert found.left_out[0].reason == "its trajectory has no cell at 5%"
    with pytest.raises(InputError, match="at all of the budgets"):
        trajectories(cells_of([(1, 2, 3)])[:2] + cells_of([(1, 2, 3)] * 2)[-1:], "arm", "host", settings=FAST)


def test_budgets_are_ordered_by_size():
    assert by_size({"10%", "5%", "2.5%"}) == ["2.5%", "5%", "10%"]
    assert by_size({"1024tokens", "512tokens"}) == ["512tokens", "1024tokens"]
    with pytest.raises(InputError, match="several kinds"):
        by_size({"5%", "512tokens"})
    with pytest.raises(InputError, match="is not understood"):
        by_size({"little"})
    with pytest.raises(InputError, match="two budgets or more"):
        trajectories(cells_of([(1,)], ("5%",)), "arm", "host", settings=FAST)
