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
from kvpress.matryoshka.judge import judge_all
from kvpress.matryoshka.rank_score import RankScore
from kvpress.matryoshka.search_evolution import Round, evolve
from kvpress.matryoshka.search_greedy import greedy
from kvpress.matryoshka.search_sensitivity import measure_sensitivity

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


def test_the_score_is_the_divergence_from_the_full_model():
    model = small_model()
    bases, windows = bases_of(model), some_windows(3, 16)
    ranks = Ranks(((8, 32), (24, 16)), ((16, 8), (32, 24)))
    with RankScore(model, bases, windows) as score:
        expected = judge_all(model, windows, [(bases, ranks)])[0].kl
        assert score(ranks) == pytest.approx(float(expected.mean()))
        assert score(ranks, 1) == pytest.approx(float(expected[0]))
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
        found = measure_sensitivity(score, shapes, STEP).allocate(0.5)
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
    with RankScore(model, bases, some_windows(1, 8)) as score, pytest.raises(KvpressError, match="no number"):
        score(Ranks.uniform([(2, 32, 32)] * 2, 0.5))
