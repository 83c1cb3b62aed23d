"""The stage measures against loops in float64, and the inequality of Prop. 3."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from kvpress.evidence import LayerSpec, Queries
from kvpress_eval.diagnostic.measure import access_measures, gold_kept, value_measures
from kvpress_eval.diagnostic.witness import Law, LayerWitness, Witness

HEADS, GROUP, PROMPT, STEPS, TAIL, DIM = 2, 3, 11, 4, 2, 5


def layer(seed, sinks=False, softcap=None):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    end = PROMPT + TAIL + STEPS
    spec = LayerSpec(seed, GROUP, DIM**-0.5, softcap, draw(HEADS, GROUP) if sinks else None)
    answer = Queries(draw(HEADS, GROUP, STEPS, DIM), torch.arange(end - STEPS, end), torch.ones(STEPS))
    last = Queries(draw(HEADS, GROUP, 1, DIM), torch.tensor([PROMPT - 1]), torch.ones(1))
    return LayerWitness(spec, draw(HEADS, end, DIM), draw(HEADS, end, DIM), PROMPT, last, answer)


def witness(n_layers=2, **options):
    return Witness(
        (1,) * STEPS, {index: layer(index, **options) for index in range(n_layers)}, torch.zeros(STEPS - 1, 7)
    )


def random_sets(seed, n_layers=2, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    return {index: torch.rand(HEADS, PROMPT, generator=generator) < share for index in range(n_layers)}


def attention(one, h, g, query, position, upto, sink=True):
    """Attention of one query over the tokens at 0 ... min(position, upto - 1), one number after the other."""
    logits = []
    for i in range(min(position + 1, upto)):
        logit = one.spec.scale * float(query @ one.keys[h, i])
        logits.append(one.spec.softcap * math.tanh(logit / one.spec.softcap) if one.spec.softcap else logit)
    extra = [float(one.spec.sinks[h, g])] if sink and one.spec.sinks is not None else []
    total = sum(math.exp(x) for x in logits + extra)
    return [math.exp(x) / total for x in logits]


def over_prompt(one, h, g, query, position):
    found = attention(one, h, g, query, position, PROMPT)
    return [a / sum(found) for a in found]


def tv(p, q):
    return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def mean(values):
    values = list(values)
    return sum(values) / len(values)


HEAD_PAIRS = [(h, g) for h in range(HEADS) for g in range(GROUP)]


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 2.0}])
def test_access_equals_loops(options):
    seen, kept = witness(**options), random_sets(3)
    found = access_measures(seen, kept, {}, ())
    first, phase, fit, inside = [], [], [], []
    for index, one in seen.layers.items():
        for h, g in HEAD_PAIRS:
            stays = kept[index][h].tolist()
            p_last = over_prompt(one, h, g, one.last.vectors[h, g, 0], PROMPT - 1)
            steps = [
                over_prompt(one, h, g, one.answer.vectors[h, g, u], int(one.answer.positions[u])) for u in range(STEPS)
            ]
            total = sum(p for p, s in zip(p_last, stays, strict=True) if s)
            tail = [p / total if s else 0.0 for p, s in zip(p_last, stays, strict=True)]
            first.append(tv(steps[0], tail))
            phase.append(tv(steps[0], p_last))
            fit.append(1 - total)
            inside += [sum(p for p, s in zip(step, stays, strict=True) if s) for step in steps]
    assert found.tv_first == pytest.approx(mean(first), abs=1e-12)
    assert found.tv_phase == pytest.approx(mean(phase), abs=1e-12)
    assert found.tv_fit == pytest.approx(mean(fit), abs=1e-12)  # eq. 7: eta_proj = 1 - p_T(K)
    assert found.kept_decode == pytest.approx(mean(inside), abs=1e-12)
    assert found.tv_decode is None
    assert found.gold_tokens is None


def test_a_set_without_any_of_the_last_querys_attention_is_at_distance_one():
    nothing = {index: torch.zeros(HEADS, PROMPT, dtype=torch.bool) for index in range(2)}
    found = access_measures(witness(), nothing, {}, ())
    assert (found.tv_first, found.tv_fit, found.kept_decode) == (1.0, 1.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.95))
def test_the_tail_bound_of_prop_3_holds(seed, share):
    one = Witness((1,) * STEPS, {seed: layer(seed)}, torch.zeros(STEPS - 1, 7))
    found = access_measures(one, {seed: random_sets(seed, 1, share)[0]}, {}, ())
    assert found.tv_first <= found.tv_phase + found.tv_fit + 1e-12


@pytest.mark.parametrize("block", [1, 4])
def test_the_distance_of_an_arms_own_law(block):
    seen = witness(1)
    starts = torch.arange(0, PROMPT + 3, block)  # a late cut has units of the answer too
    generator = torch.Generator().manual_seed(5)
    exposure = torch.rand(HEADS, starts.numel(), generator=generator, dtype=torch.float64)
    real = torch.ones(HEADS, starts.numel(), dtype=torch.bool)
    law = Law(exposure, exposure, starts.expand(HEADS, -1), real, ~real, block, 4, 0, 0, None)
    found = access_measures(seen, random_sets(1, 1), {0: law}, ())
    one, expected = seen.layers[0], []
    units = [range(s, min(s + block, PROMPT)) for s in range(0, PROMPT, block)]
    for h in range(HEADS):
        steps = [
            over_prompt(one, h, g, one.answer.vectors[h, g, u], int(one.answer.positions[u]))
            for g in range(GROUP)
            for u in range(STEPS)
        ]
        decode = [mean(step[i] for step in steps) for i in range(PROMPT)]
        own = exposure[h, : len(units)].tolist()
        expected.append(tv([sum(decode[i] for i in unit) for unit in units], [x / sum(own) for x in own]))
    assert found.tv_decode == pytest.approx(mean(expected), abs=1e-12)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 2.0}])
def test_output_change_equals_attention_over_what_is_left(options):
    seen, kept = witness(**options), random_sets(7)
    found = value_measures(seen, kept)

    def change(index, h, g, query, position):
        one = seen.layers[index]
        upto = one.keys.shape[1]
        full = attention(one, h, g, query, position, upto)
        stays = [*kept[index][h].tolist(), *[True] * upto][: len(full)]
        sink = 1 - sum(full)
        left = sum(p for p, s in zip(full, stays, strict=True) if s) + sink
        before = sum((p * one.values[h, i] for i, p in enumerate(full)), torch.zeros(DIM, dtype=torch.float64))
        after = sum(
            (p / left * one.values[h, i] for i, p in enumerate(full) if stays[i]), torch.zeros(DIM, dtype=torch.float64)
        )
        return float((after - before).norm() / before.norm())

    predicted, measured, by_step = [], [], [[] for _ in range(STEPS)]
    for index, one in seen.layers.items():
        for h in range(HEADS):
            predicted.append(mean(change(index, h, g, one.last.vectors[h, g, 0], PROMPT - 1) for g in range(GROUP)))
            steps = [
                [change(index, h, g, one.answer.vectors[h, g, u], int(one.answer.positions[u])) for g in range(GROUP)]
                for u in range(STEPS)
            ]
            measured.append(mean(mean(step) for step in steps))
            for u, step in enumerate(steps):
                by_step[u] += step
    assert found.predicted == pytest.approx(mean(predicted), rel=1e-9)
    assert found.measured == pytest.approx(mean(measured), rel=1e-9)
    assert found.agreement == pytest.approx(spearmanr(predicted, measured).statistic, abs=1e-12)
    assert found.by_layer == pytest.approx([mean(measured[:HEADS]), mean(measured[HEADS:])], abs=1e-5)
    assert found.by_step == pytest.approx([mean(step) for step in by_step], abs=1e-5)


def test_nothing_evicted_changes_nothing_and_has_no_rank_correlation():
    everything = {index: torch.ones(HEADS, PROMPT, dtype=torch.bool) for index in range(2)}
    found = value_measures(witness(), everything)
    assert found.measured == pytest.approx(0, abs=1e-12)
    assert access_measures(witness(), everything, {}, ()).kept_decode == pytest.approx(1)


def test_gold_is_counted_by_token_by_fact_and_by_group():
    # two facts: tokens 1-3 and 6-7; three heads keep both, half of the first, the second alone
    stays = torch.zeros(3, 10, dtype=torch.bool)
    stays[0, [1, 2, 3, 6, 7]] = True
    stays[1, [1, 2]] = True
    stays[2, [6, 7, 9]] = True
    found = gold_kept(stays, [(1, 4), (6, 8)])
    assert found.tokens == pytest.approx((5 + 2 + 2) / 15)
    assert found.whole == pytest.approx((2 + 0 + 1) / 6)
    assert found.broken == pytest.approx(1 / 6)  # head 1, the first fact
    assert found.group_broken == pytest.approx(1 / 3)  # head 2 has one fact of two


def test_what_an_earlier_eviction_took_counts_as_missed():
    seen = witness(1)
    left = torch.tensor([0, 1, 4, 9])
    exposure = torch.full((HEADS, 4), 0.25, dtype=torch.float64)
    real = torch.ones(HEADS, 4, dtype=torch.bool)
    law = Law(exposure, exposure, left.expand(HEADS, -1), real, ~real, 1, 4, 0, 0, None)
    found = access_measures(seen, random_sets(1, 1), {0: law}, ())
    one, expected = seen.layers[0], []
    for h in range(HEADS):
        steps = [
            over_prompt(one, h, g, one.answer.vectors[h, g, u], int(one.answer.positions[u]))
            for g in range(GROUP)
            for u in range(STEPS)
        ]
        decode = [mean(step[i] for step in steps) for i in range(PROMPT)]
        expected.append(tv(decode, [0.25 if i in left.tolist() else 0.0 for i in range(PROMPT)]))
    assert found.tv_decode == pytest.approx(mean(expected), abs=1e-12)


def test_of_alternatives_each_head_is_judged_by_its_best():
    stays = torch.zeros(2, 10, dtype=torch.bool)
    stays[0, [1, 2, 3, 6]] = True
    stays[1, [6]] = True
    found = gold_kept(stays, [(1, 4), (6, 8)], any_fact=True)
    assert (found.tokens, found.whole, found.broken) == (0.75, 0.5, 0.5)
    kept = {index: torch.ones(HEADS, PROMPT, dtype=torch.bool) for index in range(2)}
    assert access_measures(witness(), kept, {}, [(1, 4), (6, 8)]).group_broken == 0
    assert access_measures(witness(), kept, {}, [(1, 4), (6, 8)], any_fact=True).group_broken is None
