"""Searches over ranks against exhaustive ones, and the budgets they must keep."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka_support import bases_of, small_model, some_windows

from kvpress.errors import InputError, KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.entries import Entries
from kvpress.matryoshka.rank_score import RankScore
from kvpress.matryoshka.search_evolution import Round, evolve
from kvpress.matryoshka.search_exchange import exchange
from kvpress.matryoshka.search_greedy import greedy
from kvpress.matryoshka.search_sensitivity import measure_sensitivity
from kvpress.matryoshka.student import attached_student

SHAPES = [(2, 32, 32)]
STEP = 8


def additive(seed):
    """A score that adds up falling damages of every entry, and the damages."""
    generator = torch.Generator().manual_seed(seed)
    damage = torch.rand(4, 4, generator=generator).double().flip(1).cumsum(1).flip(1)
    damage[:, 3] = 0

    def score(ranks):
        flat = Entries.of(SHAPES, STEP).flat(ranks)
        return float(sum(damage[i, rank // STEP - 1] for i, rank in enumerate(flat)))

    return score


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.25, 0.375, 0.5, 0.6, 0.75, 0.99, 1.0]))
def test_the_allocation_by_sensitivity_is_the_best_where_damages_add_up(seed, share):
    score = additive(seed)
    found = measure_sensitivity(score, SHAPES, STEP).allocate(share)
    entries = Entries.of(SHAPES, STEP)
    every = (list(flat) for flat in itertools.product((8, 16, 24, 32), repeat=4))
    best = min(score(entries.ranks(flat)) for flat in every if sum(flat) <= share * 128)
    assert found.share(SHAPES) <= share
    assert score(found) == pytest.approx(best)


def test_greedy_lowers_what_hurts_least():
    score = additive(3)
    entries = Entries.of(SHAPES, STEP)
    flat, seen = [32] * 4, []
    while sum(flat) > 0.5 * 128:
        options = [[*flat[:i], flat[i] - 8, *flat[i + 1 :]] for i in range(4) if flat[i] > 8]
        flat = min(options, key=lambda one: score(entries.ranks(one)))
    found = greedy(score, SHAPES, 0.5, STEP, watch=lambda done, total: seen.append((done, total)))
    assert entries.flat(found) == flat
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {32}


def test_evolution_never_gets_worse_and_finds_the_best_of_a_small_space():
    score = additive(5)
    start = Ranks.uniform(SHAPES, 0.5)

    def partial(ranks, windows):
        return score(ranks)

    found = evolve(partial, SHAPES, start, generations=40, children=8, rounds=(Round(3, 1), Round(1, 2)), step=STEP)
    assert found.total == start.total
    best = measure_sensitivity(score, SHAPES, STEP).allocate(0.5)
    assert score(found) <= score(start)
    assert score(found) == pytest.approx(score(best))
    again = evolve(partial, SHAPES, start, generations=40, children=8, rounds=(Round(3, 1), Round(1, 2)), step=STEP)
    assert again == found


def test_the_parent_stays_where_no_child_is_better():
    start = Ranks.uniform(SHAPES, 0.5)
    found = evolve(lambda ranks, windows: float(ranks != start), SHAPES, start, generations=3, step=STEP)
    assert found == start


def convex(seed, entries):
    """An additive score in which every further step of an entry is worth less than the one before, and the worth of steps in it."""
    generator = torch.Generator().manual_seed(seed)
    gains = [
        torch.rand(limit // step, generator=generator).double().sort(descending=True).values
        for limit, step in zip(entries.limits, entries.steps, strict=True)
    ]

    def score(ranks):
        return float(
            sum(
                gain[rank // s :].sum() for gain, rank, s in zip(gains, entries.flat(ranks), entries.steps, strict=True)
            )
        )

    def worth(entries, flat):
        levels = [rank // step for rank, step in zip(flat, entries.steps, strict=True)]
        last = [float(gain[level - 1]) for gain, level in zip(gains, levels, strict=True)]
        return last, [float(gain[level : level + 1].sum()) for gain, level in zip(gains, levels, strict=True)]

    return score, worth


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.25, 0.375, 0.5, 0.6, 0.75, 0.99, 1.0]))
def test_exchanges_find_the_best_where_damages_add_up_and_further_steps_are_worth_less(seed, share):
    entries = Entries.of(SHAPES, STEP)
    score, worth = convex(seed, entries)
    found = exchange(score, worth, SHAPES, share, rounds=40, step=STEP)
    assert score(found) == pytest.approx(score(measure_sensitivity(score, SHAPES, STEP).allocate(share)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.125, 0.3, 0.5, 0.8]), st.booleans())
def test_exchanges_keep_the_budget_and_never_get_worse_whatever_the_slopes_say(seed, share, same):
    shapes = [(2, 64, 64 if same else 128), (1, 64, 64)]
    entries = Entries.of(shapes)
    score, _ = convex(seed, entries)
    generator = torch.Generator().manual_seed(seed)

    def lie(entries, flat):
        return torch.rand(len(flat), generator=generator).tolist(), torch.rand(len(flat), generator=generator).tolist()

    found = exchange(score, lie, shapes, share, rounds=3)
    even = exchange(score, lie, shapes, share, rounds=0)
    assert entries.budget(share) - max(entries.steps) < found.total == even.total <= entries.budget(share)
    assert score(found) <= score(even)
    if Ranks.is_uniform(shapes, share):
        assert even == Ranks.uniform(shapes, share)


def test_an_exchange_stops_where_nothing_promises_more():
    seen = []
    exchange(
        lambda ranks: 1.0,
        lambda entries, flat: ([1.0] * 4, [0.5] * 4),
        SHAPES,
        0.5,
        step=STEP,
        watch=lambda *at: seen.append(at),
    )
    assert seen == [(0, 4), (4, 4)]


def divergences(model, windows, bases, ranks):
    """[m]: KL(full || projected) of the second half of every window, written out."""
    with torch.no_grad(), attached_student(model) as read:
        full = model(input_ids=windows, use_cache=False).logits[:, :-1].log_softmax(-1)
        projected = read(windows, bases, ranks)[:, :-1].log_softmax(-1)
    return (full.exp() * (full - projected)).sum(-1)[:, windows.shape[1] // 2 :].mean(1)


def test_the_worth_of_a_step_is_the_slope_of_the_divergence():
    """Against differences: the amounts of a step's columns in U U^T a little up and down, a model in float64."""
    model = small_model().double()
    bases, windows = bases_of(model).to("cpu", torch.float64), some_windows(2, 16)
    shapes = [(2, 32, 32)] * 2
    entries = Entries.of(shapes, STEP)
    flat = [8, 16, 24, 32, 16, 16, 8, 24]
    with RankScore(model, bases, windows) as score:
        last, following = score.worth(entries, flat)

    def divergence(entry, first, change):
        tables = [torch.zeros(2, 32, dtype=torch.float64) for _ in range(4)]
        for row, rank in zip((row for table in tables for row in table), flat, strict=True):
            row[:rank] = 1
            row[rank - STEP if rank > STEP else rank : rank + STEP] = 0.5
        tables[entry // 2][entry % 2, first : first + STEP] += change
        keys, values = (
            [basis * table.sqrt()[:, None] for basis, table in pairs]
            for pairs in (zip(bases.keys, tables[:2], strict=True), zip(bases.values, tables[2:], strict=True))
        )
        scaled = Bases(bases.layers, tuple(keys), tuple(values), bases.means)
        return float(divergences(model, windows, scaled, Ranks.full(shapes)).mean())

    def slope(entry, first):
        return (divergence(entry, first, -0.1) - divergence(entry, first, 0.1)) / 0.2  # logits are compared in float32

    for entry, rank in enumerate(flat):
        assert last[entry] == pytest.approx(slope(entry, rank - STEP) if rank > STEP else 0, rel=1e-2, abs=5e-7)
        assert following[entry] == pytest.approx(slope(entry, rank) if rank < 32 else 0, rel=1e-2, abs=5e-7)
    assert any(last)
    assert any(following)


def test_the_score_is_the_divergence_from_the_full_model_with_half_a_window_of_context():
    model = small_model()
    bases, windows = bases_of(model), some_windows(3, 16)
    ranks = Ranks(((8, 32), (24, 16)), ((16, 8), (32, 24)))
    expected = divergences(model, windows, bases, ranks)
    with RankScore(model, bases, windows) as score:
        assert score(ranks) == pytest.approx(float(expected.mean()), rel=1e-4)
        assert score(ranks, 1) == pytest.approx(float(expected[0]), rel=1e-4)
        assert score(Ranks.full([(2, 32, 32)] * 2)) == pytest.approx(0, abs=1e-6)


def test_logits_that_do_not_fit_are_read_again(monkeypatch):
    model = small_model()
    bases, windows = bases_of(model), some_windows(2, 16)
    ranks = Ranks.uniform([(2, 32, 32)] * 2, 0.5)
    with RankScore(model, bases, windows) as score:
        kept = score(ranks)
    monkeypatch.setattr("kvpress.matryoshka.rank_score.MAX_LOGITS", 0)
    with RankScore(model, bases, windows) as score:
        assert score(ranks) == kept


def test_searched_ranks_beat_uniform_ones_where_heads_differ():
    """One layer's bases are useless, so its dimensions are worth more than the other's."""
    model = small_model()
    good, bad = bases_of(model), bases_of(model, "random")
    bases = Bases(good.layers, (good.keys[0], bad.keys[1]), (good.values[0], bad.values[1]), good.means)
    windows, shapes = some_windows(2, 24), [(2, 32, 32)] * 2
    with RankScore(model, bases, windows) as score:
        for found in (
            measure_sensitivity(score, shapes, STEP).allocate(0.5),
            exchange(score, score.worth, shapes, 0.5, step=STEP),
        ):
            assert found.share(shapes) <= 0.5
            assert score(found) < score(Ranks.uniform(shapes, 0.5))


@pytest.mark.parametrize(
    ("step", "share", "sentence"),
    [
        (12, 0.5, "a step of 12 does not divide 32 dimensions"),
        (None, 0.5, "a step of 4 does not divide 32 dimensions into multiples of 8: name a step that does"),
        (8, 0.2, "a share of 0.2 of the bytes is below the lowest ranks, which take 0.25"),
        (8, 1.2, "a share of 1.2"),
    ],
)
def test_searches_that_cannot_begin(step, share, sentence):
    with pytest.raises(InputError, match=sentence):
        greedy(lambda ranks: 0.0, SHAPES, share, step)


def test_a_score_that_is_no_number_is_told():
    model = small_model()
    bases = bases_of(model)
    bases.keys[0][0, 0, 0] = torch.nan
    with RankScore(model, bases, some_windows(1, 8)) as score:
        with pytest.raises(KvpressError, match="no number"):
            score(Ranks.uniform([(2, 32, 32)] * 2, 0.5))
        with pytest.raises(KvpressError, match="no number"):
            score.worth(Entries.of([(2, 32, 32)] * 2, STEP), [16] * 8)
