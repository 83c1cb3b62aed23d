"""The published aggregates, from cells that have the published counts, through the functions that a report calls."""

from __future__ import annotations

import itertools

import numpy as np
import published_diagnostic as published
import pytest

from kvpress_eval.diagnostic.leverage import leverage
from kvpress_eval.diagnostic.margins import classes, margin
from kvpress_eval.diagnostic.sign_settings import SignSettings
from kvpress_eval.diagnostic.signs import evaluate
from kvpress_eval.diagnostic.trajectories import trajectories

FAST = SignSettings(repeats=2, n_studies=0, n_permutations=200)
PRINTED = 0.051  # percentages are printed to one decimal


def main_split(lifts=None, margins=None):
    """The 96 cells of Table 10, with the mean lifts of its rows."""
    found = []
    names = published.keys(96)
    for (side, group), ((positive, negative, tied), _, mean) in published.COUPLING.items():
        values = published.with_mean([1] * positive + [-1] * negative + [0] * tied, mean)
        for number, value in enumerate(values):
            # of those without a positive margin some tie, as cells do
            gap = 3.0 if group == "favourable" else (0.0 if number % 5 == 0 else -2.0)
            found.append(
                published.cell(next(names), 0.02 if side == "low" else 0.6, full=40 + gap, host=40.0, mii=40 + value)
            )
    return found


@pytest.fixture(scope="module")
def result():
    return evaluate(main_split(), "host", "mii", settings=FAST)


@pytest.mark.parametrize("name", ["favourable", "unfavourable"])
def test_groups_of_the_main_split(result, name):
    n, positive, mean, percent, p = published.GROUPS[name]
    group = getattr(result.raw, name)
    assert group.n_cells == n
    assert group.positive.value * n / 100 == pytest.approx(positive)
    assert group.positive.value == pytest.approx(percent, abs=PRINTED)
    assert group.p == pytest.approx(p, rel=0.02)
    assert group.mean_delta.value == pytest.approx(mean, abs=0.011)
    prediction = percent if name == "favourable" else 100 - percent
    assert group.match.value == pytest.approx(prediction, abs=PRINTED)


def test_gaps_and_direction_match_of_the_main_split(result):
    assert result.raw.rate_gap.value == pytest.approx(published.GAPS["rate_gap"], abs=PRINTED)
    assert result.raw.mean_gap.value == pytest.approx(published.GAPS["mean_gap"], abs=0.011)
    assert result.raw.match.value == pytest.approx(published.GAPS["match"], abs=PRINTED)
    n, percent, mean = published.ALL
    favourable, unfavourable = result.raw.favourable, result.raw.unfavourable
    assert result.raw.n_cells == n == favourable.n_cells + unfavourable.n_cells
    positive = favourable.positive.value * favourable.n_cells + unfavourable.positive.value * unfavourable.n_cells
    assert positive / n == pytest.approx(percent, abs=PRINTED)
    total = favourable.mean_delta.value * favourable.n_cells + unfavourable.mean_delta.value * unfavourable.n_cells
    assert total / n == pytest.approx(mean, abs=0.011)


@pytest.mark.parametrize(("side", "name"), list(published.COUPLING))
def test_subgroups_by_coupling(result, side, name):
    (positive, negative, tied), percent, mean = published.COUPLING[side, name]
    group = getattr(getattr(result.coupling, side).raw, name)
    assert group.n_cells == positive + negative + tied
    assert group.positive.value == pytest.approx(percent, abs=PRINTED)
    assert group.tied.value == pytest.approx(100 * tied / group.n_cells)
    assert group.negative.value == pytest.approx(100 * negative / group.n_cells)
    assert group.mean_delta.value == pytest.approx(mean, abs=1e-6)


def test_ties_of_the_margin_are_a_class_of_their_own(result):
    positive, tie, negative = result.raw.table
    assert positive.n_cells == 62
    assert tie.n_cells + negative.n_cells == 34
    assert tie.n_cells == 5 + 3  # every fifth of 23 and of 11
    assert tie.p is None


@pytest.mark.parametrize("model", published.MODELS)
def test_match_by_model(model):
    """The counts behind the percentages of Table 11 are ours; they must add up to those of all cells."""
    (favourable, hits, n), (unfavourable, others, rest) = published.BY_MODEL[model]
    names = published.keys(n + rest, [model])
    lifts = [(3.0, 1)] * hits + [(3.0, -1)] * (n - hits) + [(-2.0, -1)] * others + [(-2.0, 1)] * (rest - others)
    cells = [published.cell(next(names), full=40 + gap, host=40.0, mii=40.0 + lift) for gap, lift in lifts]
    raw = evaluate(cells, "host", "mii", settings=FAST).raw
    assert raw.favourable.match.value == pytest.approx(favourable, abs=PRINTED)
    assert raw.unfavourable.match.value == pytest.approx(unfavourable, abs=PRINTED)
    for place, (total, good) in enumerate([(62, 45), (34, 23)]):
        assert sum(published.BY_MODEL[each][place][2] for each in published.MODELS) == total
        assert sum(published.BY_MODEL[each][place][1] for each in published.MODELS) == good


def test_the_sample_disjoint_gap_is_the_sum_of_its_matches():
    favourable, unfavourable, gap = published.DISJOINT
    assert favourable - (100 - unfavourable) == pytest.approx(gap, abs=0.5)
    assert gap < published.GAPS["rate_gap"]


def nolev_and_mii(rows):
    """Cells with these (NoLev - host, MII - host)."""
    return [
        published.cell(key, full=45.0, host=40.0, nolev=40.0 + first, mii=40.0 + second)
        for key, (first, second) in zip(published.keys(len(rows)), rows, strict=True)
    ]


def test_leverage_over_264_cells():
    """239 cells agree in sign, 12 are rescued, 13 broken; of residuals, 162 have the sign of MII's lift."""
    rescues, breaks = published.LEVERAGE["rescues"], published.LEVERAGE["breaks"]
    # a rescue's residual is positive and so is the lift, a break's are neither: 25 of the 162 are these
    rows = [(-1.0, 1.0)] * rescues + [(1.0, -1.0)] * breaks
    rows += [(1.0, 2.0)] * 90 + [(2.0, 1.0)] * 52 + [(-1.0, -2.0)] * 47 + [(-2.0, -1.0)] * 50
    found = leverage(nolev_and_mii(rows), "host", "nolev", "mii", settings=FAST)
    assert found.n_cells == published.LEVERAGE["n"]
    for count, (cells, percent) in (
        (found.raw.agreement, published.LEVERAGE["agree"]),
        (found.raw.residual_match, published.LEVERAGE["residual"]),
    ):
        assert count.cells == pytest.approx(cells)
        assert count.share.value == pytest.approx(percent, abs=PRINTED)
    assert (found.raw.rescues.cells, found.raw.breaks.cells) == (rescues, breaks)
    assert rescues + breaks == published.LEVERAGE["n"] - found.raw.agreement.cells == 25
    assert found.raw.taxes.cells == 52


@pytest.mark.parametrize("row", published.STRENGTH, ids=lambda row: f"{row[0]}-{row[1]}")
def test_leverage_strength(row):
    """Cells with the wins, losses, ties, rescues, breaks and taxes of a row of Table 20, and its mean lifts."""
    model, alpha, mii, (wins, losses, ties), nolev, residual, (rescues, breaks, taxes, failures) = row
    assert mii == pytest.approx(nolev + residual, abs=0.0011)
    signs = [(-1, 1)] * rescues + [(1, 2)] * (wins - rescues - taxes) + [(2, 1)] * taxes
    signs += [(1, -1)] * breaks + [(-1, -1)] * (losses - breaks) + [(-1, 0)] * ties
    cells = nolev_and_mii([(0.1 * first, 0.1 * second) for first, second in signs])
    found = leverage(cells, "host", "nolev", "mii", settings=FAST)
    assert (found.n_cells, found.wins, found.losses, found.ties) == (16, wins, losses, ties)
    counts = [found.raw.rescues, found.raw.breaks, found.raw.taxes, found.raw.support_failures]
    excess = 1 if (model, alpha) == published.STRENGTH_EXCEPTION else 0
    assert [count.cells for count in counts] == pytest.approx([rescues, breaks, taxes, failures + excess])
    assert found.mean_mii.value == pytest.approx(found.mean_nolev.value + found.mean_residual.value)


@pytest.mark.parametrize("surface", published.SURFACES)
def test_surface_local_margins(surface):
    mean, positive, rest = published.SURFACES[surface]
    assert positive + rest == 96
    gaps = published.with_mean([1] * positive + [-1] * rest, mean)
    cells = [
        published.cell(k, full=40 + gap, **{surface: 40.0}) for k, gap in zip(published.keys(96), gaps, strict=True)
    ]
    margins = np.array([margin(cell, surface) for cell in cells])
    assert [int((classes(margins, 1e-6) == sign).sum()) for sign in (1, 0, -1)] == [positive, 0, rest]
    assert margins.mean() == pytest.approx(mean)


def test_on_pyramid_the_nonpositive_side_does_not_transfer():
    _, n, rest = published.SURFACES["pyramidkv"]
    good, other = round(n * published.PYRAMID[0] / 100), round(rest * published.PYRAMID[1] / 100)
    rows = [(3, 1)] * good + [(3, -1)] * (n - good) + [(-2, 1)] * other + [(-2, -1)] * (rest - other)
    cells = [
        published.cell(key, full=40.0 + gap, pyramidkv=40.0, mii=40.0 + lift)
        for key, (gap, lift) in zip(published.keys(96), rows, strict=True)
    ]
    raw = evaluate(cells, "pyramidkv", "mii", settings=FAST).raw
    assert raw.favourable.positive.value == pytest.approx(published.PYRAMID[0], abs=PRINTED)
    assert raw.unfavourable.positive.value == pytest.approx(published.PYRAMID[1], abs=PRINTED)
    assert raw.unfavourable.p > 0.5


def test_trajectories():
    """36 trajectories of seven shapes, found by hand, that add up to the published counts and shares."""
    shapes = [
        (3, (1.0, 2.0, 3.0, 4.0)),  # rising
        (3, (-4.0, -3.0, -2.0, -1.0)),  # rising, a loss at every budget
        (12, (1.0, -1.0, 4.0, 0.5)),  # dip at 5 %, best at 10 %
        (4, (-1.0, 1.0, 2.0, 1.5)),  # best at 10 %
        (4, (2.0, 1.0, 0.0, 3.0)),  # tie at 10 %, which is a dip
        (3, (2.0, 3.0, 1.0, 4.0)),
        (7, (1.2, 1.443, -1.0, 1.0)),
    ]
    assert sum(n for n, _ in shapes) == published.TRAJECTORIES["n"]
    each = np.array(list(itertools.chain.from_iterable([shape] * n for n, shape in shapes))) * 0.6977
    budgets = published.TRAJECTORIES["budgets"]
    keys = published.keys(36 * 4, published.MODELS, budgets)
    by_key = {}
    for key in keys:
        by_key.setdefault((key.task, key.model), []).append(key)
    cells = []
    for (_, names), shape in zip(by_key.items(), each, strict=True):
        cells += [published.cell(key, host=40.0, mii=40 + value) for key, value in zip(names, shape, strict=True)]
    found = trajectories(cells, "mii", "host", settings=FAST)
    assert (found.n, found.budgets) == (36, budgets)
    assert found.n_monotone == published.TRAJECTORIES["monotone"]
    assert found.monotone.value == pytest.approx(100 * 6 / 36)
    at = {one.budget: one for one in found.at_budget}
    assert at["5%"].dips == published.TRAJECTORIES["dips"]
    assert (at["10%"].wins, at["10%"].losses, at["10%"].ties) == published.TRAJECTORIES["outcome"]
    assert at["10%"].best == published.TRAJECTORIES["best"]
    assert at["10%"].mean.value == pytest.approx(published.TRAJECTORIES["mean"], abs=0.001)
    assert found.best_fixed == published.TRAJECTORIES["best_fixed"]
    assert found.share_of_oracle == pytest.approx(published.TRAJECTORIES["of_oracle"], abs=PRINTED)


def test_signs_across_models_add_up():
    for counts in published.ACROSS_MODELS:
        assert sum(counts) == 24


def test_needles_are_shares_of_24_and_of_8():
    for model, both in published.NEEDLES.items():
        for values, n in zip(both, (24, 8), strict=True):
            for value in values:
                assert value == pytest.approx(100 * round(value * n / 100) / n, abs=PRINTED), model
    for place, means in enumerate(published.NEEDLES_MEAN):
        seen = np.mean([both[place] for both in published.NEEDLES.values()], axis=0)
        assert seen == pytest.approx(means, abs=PRINTED)
