"""The boundary: random exchanges of equal size, distance to the threshold, and how scores order units that are left out."""

import pytest
import torch
from induction_model import induction_model, induction_tokenizer, lookup_sample
from scipy.stats import mannwhitneyu, spearmanr

from kvpress_eval.diagnostic.boundary import choose_units, exchange_at_random, exchange_measures, unit_measures
from kvpress_eval.diagnostic.finding import Finding
from kvpress_eval.diagnostic.replay import Reading
from kvpress_eval.diagnostic.witness import Law
from kvpress_eval.prompt import render
from kvpress_eval.sweep import parse_sweep

HEADS, TOKENS, KEPT, RECENT = 2, 40, 12, 4


def law(seed, protected=RECENT):
    scores = torch.rand(HEADS, TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shielded = torch.zeros(HEADS, TOKENS, dtype=torch.bool)
    shielded[:, TOKENS - protected :] = True
    real = torch.ones_like(shielded)
    return Law(scores, scores, torch.arange(TOKENS).expand(HEADS, -1), real, shielded, 1, KEPT, 0, 0, None)


def kept_by(one):
    mask = one.protected.clone()
    for head in range(HEADS):
        free = one.scores[head].masked_fill(one.protected[head], -1)
        mask[head, free.topk(KEPT - RECENT).indices] = True
    return mask


def reading(divergence):
    return Reading(0.0, 0.0, divergence, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_random_exchange_moves_as_many_tokens_and_spares_what_is_protected(seed):
    host, arm = law(seed), law(seed + 100)
    before, other = kept_by(host), kept_by(arm)
    after = exchange_at_random({0: before}, {0: other}, {0: host}, seed)[0]
    assert (before & ~after).sum(1).tolist() == (before & ~other).sum(1).tolist()
    assert after.sum(1).tolist() == before.sum(1).tolist()
    assert bool(after[:, -RECENT:].all())
    again = exchange_at_random({0: before}, {0: other}, {0: host}, seed)[0]
    assert torch.equal(after, again)


def test_what_is_near_the_threshold_is_told_by_rank():
    host = law(1)
    before = kept_by(host)
    order = [host.scores[h].masked_fill(host.protected[h], -1).argsort(descending=True).tolist() for h in range(HEADS)]
    free = KEPT - RECENT
    after = before.clone()
    # a tenth of 12 kept tokens is 1.2: the last kept one and the one before it are near, the first one is far
    after[0, order[0][free - 1]], after[0, order[0][free]] = False, True
    after[1, order[1][0]], after[1, order[1][free + 5]] = False, True
    found = exchange_measures(
        {0: before}, {0: after}, {0: host}, reading(0.5), reading(0.2), [reading(0.7), reading(0.9)]
    )
    assert found.exchanged == pytest.approx(2 / (HEADS * KEPT))
    assert found.near == pytest.approx(2 / 4)
    assert found.gain == pytest.approx(0.3)
    assert found.chance == pytest.approx(-0.3)


def test_nothing_exchanged_has_no_chance_and_nothing_near():
    host = law(2)
    found = exchange_measures({0: kept_by(host)}, {0: kept_by(host)}, {0: host}, reading(0.5), reading(0.5), [])
    assert (found.exchanged, found.near, found.gain, found.chance) == (0, None, 0, None)


def test_units_are_disjoint_unprotected_and_half_of_them_doubtful():
    laws = {index: law(index) for index in range(3)}
    kept = {index: kept_by(one) for index, one in laws.items()}
    units = choose_units(kept, laws, 4, 6, 0)
    assert len(units) == len(set(units)) == 6
    assert all(start % 4 == 0 and end - start == 4 and end <= TOKENS - RECENT for start, end in units)
    share = torch.cat([mask.double() for mask in kept.values()]).mean(0)
    doubt = {
        start: float((share[start : start + 4] * (1 - share[start : start + 4])).mean()) for start in range(0, 36, 4)
    }
    assert set(sorted(doubt, key=lambda start: -doubt[start])[:3]) <= {start for start, _ in units}


def test_spearman_and_auc_equal_scipys():
    generator = torch.Generator().manual_seed(3)
    units = [(start, start + 4) for start in range(0, 32, 4)]
    divergence = torch.rand(len(units), generator=generator).tolist()
    laws = {"a": {0: law(5), 1: law(6)}, "b": {0: law(7), 1: law(8)}}
    found = unit_measures(units, [reading(d) for d in divergence], laws, TOKENS)
    for name, by_layer in laws.items():
        shares = [
            (one.scores * ~one.protected)[h] / (one.scores * ~one.protected)[h].sum()
            for one in by_layer.values()
            for h in range(HEADS)
        ]
        scores = [float(sum(share[a:b].sum() for share in shares)) for a, b in units]
        assert found.spearman[name] == pytest.approx(spearmanr(scores, divergence).statistic)
        half = sorted(divergence)[len(units) // 2 - 1]  # torch's median is the lower one
        large = [s for s, d in zip(scores, divergence, strict=True) if d > half]
        small = [s for s, d in zip(scores, divergence, strict=True) if d <= half]
        assert found.auc[name] == pytest.approx(mannwhitneyu(large, small).statistic / (len(large) * len(small)))
    assert found.divergence == pytest.approx(sum(divergence) / len(divergence))


def test_a_study_compares_rankings_at_the_hosts_boundary():
    host = {"name": "host", "query_law": {"kind": "tail", "window": 8}, "protection": {"kind": "standard", "recent": 8}}
    fields = {"model": "m", "tasks": [{"task": "toy/one"}], "budgets": ["20%", "40%"], "host": host}
    swaps = {
        "mii": {"swap": {"ranking": "mii"}},
        "random": {"swap": {"ranking": "random"}},
        "ada": {"swap": {"allocation": "ada"}},
    }
    measure = {"boundary": 1.0, "units": 8, "width": 4, "draws": 1, "attribute": []}
    study = parse_sweep({**fields, "swaps": swaps, "measure": measure}, "test")
    model, tokenizer = induction_model(), induction_tokenizer()
    sample = lookup_sample(0)
    answers = study.engine(model, tokenizer, study.arms()).answer([render(tokenizer, sample)], [sample], True)[0]
    found = {arm.name: Finding.model_validate(one.measures) for arm, one in zip(study.arms(), answers, strict=True)}
    for budget in ("20%", "40%"):
        assert found[f"host@{budget}"].units.n == 8
        assert set(found[f"host@{budget}"].units.spearman) == {"host", "mii", "random", "null"}
        assert found[f"random@{budget}"].exchange.exchanged > 0.2
        assert found[f"null@{budget}"].exchange.exchanged <= found[f"random@{budget}"].exchange.exchanged
        for other in ("ada", "oracle", "host"):
            assert found[f"{other}@{budget}"].exchange is None
        for other in ("ada", "oracle", "mii"):
            assert found[f"{other}@{budget}"].units is None
    gain = found["random@20%"].exchange.gain
    expected = found["host@20%"].margin.divergence - found["random@20%"].margin.divergence
    assert gain == pytest.approx(expected)
