"""Every ranking against a brute force in float64 that starts from raw q, k, v and W_O of one grouped-query layer.

Attention is computed query by query with the unit really taken out where the formula means that; every formula is
written here from its paper, with plain loops, and compared with `kvpress.selection.score`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from torch import Tensor

from kvpress.contract import Contract
from kvpress.errors import ContractError, KvpressError
from kvpress.evidence import HeadGroup, LayerSpec, Queries, UnitFeatures
from kvpress.selection import Problem, decide, score

HEADS, GROUP, DIM, VALUE_DIM, HIDDEN, TOKENS, WINDOW = 2, 2, 6, 5, 7, 13, 4
SCALE = 0.5
BLOCKS = 3  # 13 tokens: four blocks and a short one
TAIL = {"kind": "tail", "window": WINDOW}


class Layer:
    """Raw tensors of one layer, and the problem that the engine gets to see."""

    def __init__(self, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.query = 2 * normal(HEADS, GROUP, TOKENS, DIM)  # one for every position
        self.keys, self.values = normal(HEADS, TOKENS, DIM), normal(HEADS, TOKENS, VALUE_DIM)
        self.output_weight = normal(HEADS, GROUP, VALUE_DIM, HIDDEN)
        self.softcap: float | None = None
        self.sinks: Tensor | None = None  # [H, G]

    def problem(
        self, contract: Contract, budget: int = TOKENS, index: int = 0, place: int = 0, n_layers: int = 1
    ) -> Problem:
        spec = LayerSpec(index, GROUP, SCALE, self.softcap, self.sinks, self.output_weight)
        groups = [HeadGroup(self.keys, self.values, torch.arange(TOKENS))]
        features = UnitFeatures(spec, groups, contract.granularity.block_size)
        positions = torch.arange(TOKENS)
        queries = Queries(self.query, positions, contract.query_law.weights(positions, TOKENS))
        return Problem(features, queries, None, None, TOKENS, budget, place, n_layers)

    def scores(self, contract: Contract, **more: int) -> Tensor:
        """[H, U]."""
        return score(contract, self.problem(contract, **more)).scores

    # --- the brute force -------------------------------------------------------------------------------------------

    def attention(self, h: int, g: int, u: int, without: tuple[int, ...] = ()) -> Tensor:
        """[N] attention of the query at position u over the tokens up to u, those in `without` taken out."""
        logits = SCALE * self.keys[h] @ self.query[h, g, u]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        hidden = torch.arange(TOKENS) > u
        hidden[list(without)] = True
        logits = logits.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            return torch.softmax(torch.cat([logits, self.sinks[h, g].view(1)]), 0)[:-1]
        return torch.softmax(logits, 0).nan_to_num(0.0)

    def change(self, h: int, g: int, u: int, unit: tuple[int, ...], in_output_space: bool = False) -> float:
        """Squared change of the output of one query head when the unit is taken out of the cache."""
        before, after = (self.attention(h, g, u, w) @ self.values[h] for w in ((), unit))
        moved = after - before if set(range(u + 1)) - set(unit) else torch.zeros_like(before)
        return float((moved @ self.output_weight[h, g] if in_output_space else moved).square().sum())

    def mass(self, h: int, g: int, u: int, unit: tuple[int, ...]) -> float:
        return float(self.attention(h, g, u)[list(unit)].sum())


LAYER = Layer()
UNITS = {
    "token": [(i,) for i in range(TOKENS)],
    "block": [tuple(range(i, min(i + 3, TOKENS))) for i in range(0, TOKENS, 3)],
}


def contract(ranking: object = "mass", **slots: object) -> Contract:
    """Last four queries, no smoothing, nothing protected; one slot or more replaced."""
    return Contract.build({"query_law": TAIL, "ranking": ranking, **slots})


def blocks(ranking: object, **slots: object) -> Contract:
    return contract(ranking, granularity={"kind": "block", "size": BLOCKS}, retention="strict_blocks", **slots)


def over_heads(formula, units: list[tuple[int, ...]]) -> Tensor:
    """formula(h, g, unit) -> [H, G, U]."""
    rows = [[[formula(h, g, unit) for unit in units] for g in range(GROUP)] for h in range(HEADS)]
    return torch.tensor(rows, dtype=torch.float64)


def mean_over_window(formula):
    """Mean over the last queries of formula(h, g, u, unit)."""
    window = range(TOKENS - WINDOW, TOKENS)
    return lambda h, g, unit: sum(formula(h, g, u, unit) for u in window) / WINDOW


def same(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


BOTH = pytest.mark.parametrize("kind", ["token", "block"])


def built(ranking: object, kind: str, **slots: object) -> Contract:
    return blocks(ranking, **slots) if kind == "block" else contract(ranking, **slots)


# --- rankings of attention and output change -----------------------------------------------------------------------


@BOTH
def test_mass(kind):
    """Mean over queries and grouped heads of the unit's attention (arXiv 2404.14469)."""
    expected = over_heads(mean_over_window(LAYER.mass), UNITS[kind]).mean(1)
    same(LAYER.scores(built("mass", kind)), expected)


@BOTH
def test_mii(kind):
    """arXiv 2605.08234 eq. 11: the squared change of the output when the unit is taken out."""
    expected = over_heads(mean_over_window(LAYER.change), UNITS[kind]).mean(1)
    same(LAYER.scores(built("mii", kind)), expected)


@BOTH
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_leverage(kind, alpha):
    """|o' - o|^2 (1 - a)^(2 - 2 alpha): NoLev at 0, MII at 1 (arXiv 2605.08234 section 4 and App. K.3)."""

    def formula(h, g, u, unit):
        return LAYER.change(h, g, u, unit) * (1 - LAYER.mass(h, g, u, unit)) ** (2 - 2 * alpha)

    expected = over_heads(mean_over_window(formula), UNITS[kind]).mean(1)
    same(LAYER.scores(built({"kind": "alpha_leverage", "alpha": alpha}, kind)), expected)
    named = {0.0: "nolev", 1.0: "mii"}.get(alpha)
    if named:
        same(LAYER.scores(built(named, kind)), expected)


@BOTH
@pytest.mark.parametrize(("name", "alpha"), [("mii", 1.0), ("nolev", 0.0)])
def test_change_of_the_residual_stream(kind, name, alpha):
    """The change is multiplied by W_O of its query head before its norm is taken (diagnostic.md section 8, item 4)."""

    def formula(h, g, u, unit):
        return LAYER.change(h, g, u, unit, in_output_space=True) * (1 - LAYER.mass(h, g, u, unit)) ** (2 - 2 * alpha)

    expected = over_heads(mean_over_window(formula), UNITS[kind]).mean(1)
    same(LAYER.scores(built({"kind": name, "norm_space": "output"}, kind)), expected, rtol=1e-8)


def test_change_of_the_residual_stream_with_a_singular_output_weight():
    layer = Layer(3)
    layer.output_weight[..., 0, :] = layer.output_weight[..., 1, :]
    layer.output_weight[1, 1] = 0
    expected = over_heads(mean_over_window(lambda h, g, u, c: layer.change(h, g, u, c, True)), UNITS["token"]).mean(1)
    same(layer.scores(contract({"kind": "mii", "norm_space": "output"})), expected, rtol=1e-7)


@pytest.mark.parametrize("ranking", ["mass", "mii", {"kind": "mii", "norm_space": "output"}], ids=str)
def test_softcap_and_learned_sinks_reach_every_head(ranking):
    """Gemma-2 caps its logits; gpt-oss adds a logit of its own per query head to the denominator."""
    layer = Layer(2)
    layer.softcap, layer.sinks = 1.5, torch.tensor([[2.0, -1.0], [0.5, 3.0]], dtype=torch.float64)
    space = isinstance(ranking, dict)
    formula = layer.mass if ranking == "mass" else lambda h, g, u, unit: layer.change(h, g, u, unit, space)
    same(layer.scores(contract(ranking)), over_heads(mean_over_window(formula), UNITS["token"]).mean(1), rtol=1e-8)


# --- rankings that weigh the mass ----------------------------------------------------------------------------------


def value_mean(formula, unit: tuple[int, ...]) -> float:
    """A feature of a block is the mean over its tokens."""
    return sum(formula(i) for i in unit) / len(unit)


@BOTH
def test_vatp(kind):
    """Mass times |v|_1 (arXiv 2406.12335)."""
    mass = over_heads(mean_over_window(LAYER.mass), UNITS[kind]).mean(1)
    norm = [
        [value_mean(lambda i, h=h: float(LAYER.values[h, i].abs().sum()), c) for c in UNITS[kind]] for h in range(HEADS)
    ]
    same(LAYER.scores(built("vatp", kind)), mass * torch.tensor(norm, dtype=torch.float64))


def output_norm(h: int, g: int, i: int, order: int) -> float:
    return float((LAYER.values[h, i] @ LAYER.output_weight[h, g]).norm(order))


@BOTH
def test_criticalkv_second_stage(kind):
    """(mass + epsilon) times the group's mean of |W_O v|_1 (arXiv 2502.03805 Algorithm 1; NVIDIA kvpress)."""
    mass = over_heads(mean_over_window(LAYER.mass), UNITS[kind]).mean(1)
    norm = over_heads(lambda h, g, c: value_mean(lambda i: output_norm(h, g, i, 1), c), UNITS[kind]).mean(1)
    found = score(c := built({"kind": "criticalkv", "epsilon": 0.01}, kind), LAYER.problem(c))
    same(found.scores, (mass + 0.01) * norm)
    share, first = found.first_stage
    assert share == 0.5
    same(first, mass)


def test_criticalkv_keeps_half_by_mass_and_half_by_weight():
    budget = 6
    c = contract({"kind": "criticalkv", "epsilon": 0.01})
    (decision,) = decide(c, [score(c, LAYER.problem(c, budget))])
    mass = over_heads(mean_over_window(LAYER.mass), UNITS["token"]).mean(1)
    norm = over_heads(lambda h, g, unit: output_norm(h, g, unit[0], 1), UNITS["token"]).mean(1)
    for h in range(HEADS):
        first = sorted(range(TOKENS), key=lambda i: -mass[h, i])[: budget // 2]
        others = [i for i in range(TOKENS) if i not in first]
        second = sorted(others, key=lambda i: -(mass[h, i] + 0.01) * norm[h, i])[: budget - len(first)]
        assert decision.kept[h].tolist() == sorted(first + second)


@BOTH
def test_caote(kind):
    """alpha / (1 - alpha) |o - v|_2 with alpha the scores scaled to sum 1, o = sum alpha v (arXiv 2504.14051 eq. 6-8)."""
    mass = over_heads(mean_over_window(LAYER.mass), UNITS[kind]).mean(1)
    share = mass / mass.sum(1, keepdim=True)
    means = torch.stack([torch.stack([LAYER.values[h, list(c)].mean(0) for c in UNITS[kind]]) for h in range(HEADS)])
    rows = []
    for h in range(HEADS):
        output = sum(share[h, c] * means[h, c] for c in range(len(UNITS[kind])))
        rows.append(
            [float(share[h, c] / (1 - share[h, c]) * (output - means[h, c]).norm()) for c in range(len(UNITS[kind]))]
        )
    same(LAYER.scores(built("caote", kind)), torch.tensor(rows, dtype=torch.float64))


def test_caote_of_one_query_is_the_exact_output_error():
    """For one query its score is |o' - o|_2 of really taking the token out (arXiv 2504.14051)."""
    layer = Layer(1)
    layer.query[:, 1] = layer.query[:, 0]  # a group that agrees acts as one head
    last = TOKENS - 1
    expected = over_heads(lambda h, g, unit: layer.change(h, g, last, unit) ** 0.5, UNITS["token"])[:, 0]
    same(layer.scores(contract("caote", query_law={"kind": "tail", "window": 1})), expected)


def test_laprox():
    """|A[:, i]|_2 |(V W_O)_i|_2 over the window, summed over grouped heads, normalised in the layer (arXiv 2605.07234)."""

    def formula(h, g, unit):
        column = sum(LAYER.mass(h, g, u, unit) ** 2 for u in range(TOKENS - WINDOW, TOKENS)) ** 0.5
        return column * output_norm(h, g, unit[0], 2)

    expected = over_heads(formula, UNITS["token"]).sum(1)
    access = {"kind": "aggregate", "query_reducer": "sum", "head_reducer": "sum"}
    found = LAYER.scores(contract("laprox", access=access))
    same(found, expected / expected.sum())
    assert float(found.sum()) == pytest.approx(1)


# --- rankings without queries --------------------------------------------------------------------------------------


@BOTH
def test_key_norm(kind):
    """Minus the key's L2 norm (arXiv 2406.11430)."""
    rows = [[-value_mean(lambda i, h=h: float(LAYER.keys[h, i].norm()), c) for c in UNITS[kind]] for h in range(HEADS)]
    same(LAYER.scores(built("key_norm", kind)), torch.tensor(rows, dtype=torch.float64))


@BOTH
def test_position_prefers_the_newest(kind):
    """arXiv 2309.17453: what is not a sink is kept by recency."""
    assert (LAYER.scores(built("position", kind)).diff(dim=1) > 0).all()


def test_random_depends_on_seed_layer_head_and_position_only():
    c = contract({"kind": "random", "seed": 5})
    scores = LAYER.scores(c)
    assert torch.equal(scores, Layer(9).scores(c))  # other tensors, same noise
    assert not torch.equal(scores, LAYER.scores(contract({"kind": "random", "seed": 6})))
    assert not torch.equal(scores, LAYER.scores(c, index=1))
    assert not torch.equal(scores[0], scores[1])
    spec = LayerSpec(index=0, group=GROUP, scale=SCALE)
    kept = torch.tensor([2, 3, 7, 11])  # after an eviction a token still has its own noise
    features = UnitFeatures(spec, [HeadGroup(LAYER.keys[:, kept], LAYER.values[:, kept], kept)], 1)
    assert torch.equal(c.ranking.weigh(None, features), scores[:, kept])


def test_random_is_uniform():
    spec = LayerSpec(index=0, group=1, scale=1.0)
    n = 4000
    features = UnitFeatures(spec, [HeadGroup(torch.zeros(3, n, 1), torch.zeros(3, n, 1), torch.arange(n))], 1)
    noise = contract({"kind": "random"}).ranking.weigh(None, features)
    assert ((noise.mean(1) - 0.5).abs() < 0.03).all()
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.08


@pytest.mark.parametrize("terms", ["a", "c", "a+c"])
def test_additive_control(terms):
    """z(mass) + weight * sum of z(term); no value enters (arXiv 2605.08234 App. K.1, formulas ours)."""

    def standard(term: Tensor) -> Tensor:
        return (term - term.mean(-1, keepdim=True)) / term.std(-1, keepdim=True, correction=0)

    def covered(h, g, u, unit):
        return float(unit[0] <= u and LAYER.mass(h, g, u, unit) > 1 / (u + 1))

    mass, concentration, coverage = (
        over_heads(mean_over_window(f), UNITS["token"])
        for f in (LAYER.mass, lambda h, g, u, c: LAYER.mass(h, g, u, c) ** 2, covered)
    )
    chosen = {"a": [concentration], "c": [coverage], "a+c": [concentration, coverage]}[terms]
    raw = standard(mass) + 0.5 * sum(standard(term) for term in chosen)
    expected = (raw - raw.amin(-1, keepdim=True)).mean(1)
    c = contract({"kind": "additive", "terms": terms})
    same(LAYER.scores(c), expected)
    other = Layer()
    other.values = other.values * 100 + 7
    assert torch.equal(other.scores(c), LAYER.scores(c))


def test_additive_control_of_ragged_heads_ignores_the_longest_head():
    """A head's scores must not change with the number of tokens that another head keeps."""
    spec = LayerSpec(index=0, group=GROUP, scale=SCALE)
    c = contract("additive")
    queries = Queries(LAYER.query, torch.arange(TOKENS), c.query_law.weights(torch.arange(TOKENS), TOKENS))

    def scores(n_second: int) -> Tensor:
        groups = [
            HeadGroup(LAYER.keys[h : h + 1, :n], LAYER.values[h : h + 1, :n], torch.arange(n))
            for h, n in enumerate((6, n_second))
        ]
        problem = Problem(UnitFeatures(spec, groups, 1), queries, None, None, TOKENS, 5, 0, 1)
        return score(c, problem).scores[0, :6]

    same(scores(12), scores(6))


# --- the access slot -----------------------------------------------------------------------------------------------


def test_weights_of_the_query_law():
    """r_u = exp(-(T - u) / tau) on the tail, 1 on anchors, normalised to sum 1 (arXiv 2605.08234 eq. 10)."""
    law = {"kind": "tail_anchors", "window": WINDOW, "tau": 2.0, "spans": [[3, 5]]}
    weight = {u: 2.718281828459045 ** (-(TOKENS - 1 - u) / 2.0) for u in range(TOKENS - WINDOW, TOKENS)} | {
        3: 1.0,
        4: 1.0,
    }

    def formula(h, g, unit):
        return sum(r * LAYER.change(h, g, u, unit) for u, r in weight.items()) / sum(weight.values())

    same(LAYER.scores(contract("mii", query_law=law)), over_heads(formula, UNITS["token"]).mean(1))


@pytest.mark.parametrize("queries", ["sum", "mean", "max"])
@pytest.mark.parametrize("heads", ["sum", "mean", "max"])
def test_reducers_over_queries_and_grouped_heads(queries, heads):
    reduce = {"sum": sum, "mean": lambda x: sum(x) / len(x), "max": max}

    def formula(h, g, unit):
        return reduce[queries]([LAYER.change(h, g, u, unit) for u in range(TOKENS - WINDOW, TOKENS)])

    expected = over_heads(formula, UNITS["token"])
    expected = {"sum": expected.sum(1), "mean": expected.mean(1), "max": expected.amax(1)}[heads]
    access = {"kind": "aggregate", "query_reducer": queries, "head_reducer": heads}
    same(LAYER.scores(contract("mii", access=access)), expected)


@BOTH
def test_debias_divides_by_the_queries_that_could_see_the_unit(kind):
    """T - i for cumulative attention (arXiv 2605.08234 App. F); for a block, those that could see its first token."""

    def formula(h, g, unit):
        seeing = range(unit[0], TOKENS)
        return sum(LAYER.mass(h, g, u, unit) for u in seeing) / len(seeing)

    access = {"kind": "aggregate", "query_reducer": "sum", "head_reducer": "mean", "debias": True}
    found = LAYER.scores(built("mass", kind, query_law="all", access=access))
    same(found, over_heads(formula, UNITS[kind]).mean(1))


def pooled(row: list[float], kind: str, kernel: int) -> list[float]:
    """Stride 1, zeros beyond the ends; the average counts them."""
    half = kernel // 2
    padded = [0.0] * half + row + [0.0] * half
    windows = [padded[i : i + kernel] for i in range(len(row))]
    return [max(w) if kind == "max" else sum(w) / kernel for w in windows]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("kernel", [3, 7])
def test_pooling_smooths_each_query_head_before_the_group_is_reduced(pooling, kernel):
    """SnapKV pools per query head; the mean over a group comes after that, which matters for the maximum."""
    raw = over_heads(mean_over_window(LAYER.change), UNITS["token"])
    smooth = [[pooled(raw[h, g].tolist(), pooling, kernel) for g in range(GROUP)] for h in range(HEADS)]
    access = {"kind": "aggregate", "pooling": pooling, "kernel": kernel}
    same(LAYER.scores(contract("mii", access=access)), torch.tensor(smooth, dtype=torch.float64).mean(1))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_protected_tokens_lend_nothing_to_their_neighbours(pooling):
    """SnapKV pools the prompt without its window (snapkv_utils.py: attn_weights[..., : -window_size])."""
    protection = {"kind": "standard", "sinks": 2, "recent": 3}
    raw = over_heads(mean_over_window(LAYER.mass), UNITS["token"])
    inner = slice(2, TOKENS - 3)
    smooth = [[pooled(raw[h, g, inner].tolist(), pooling, 3) for g in range(GROUP)] for h in range(HEADS)]
    access = {"kind": "aggregate", "pooling": pooling, "kernel": 3}
    found = LAYER.scores(contract(access=access, protection=protection))
    same(found[:, inner], torch.tensor(smooth, dtype=torch.float64).mean(1))
    for outside in (slice(0, 2), slice(TOKENS - 3, None)):  # what they hold themselves stays what it is
        same(found[:, outside], raw.mean(1)[:, outside])


def test_debias_comes_before_pooling():
    raw = over_heads(
        lambda h, g, c: sum(LAYER.mass(h, g, u, c) for u in range(c[0], TOKENS)) / (TOKENS - c[0]), UNITS["token"]
    )
    smooth = [[pooled(raw[h, g].tolist(), "avg", 3) for g in range(GROUP)] for h in range(HEADS)]
    access = {"kind": "aggregate", "query_reducer": "sum", "debias": True, "pooling": "avg", "kernel": 3}
    found = LAYER.scores(contract(query_law="all", access=access))
    same(found, torch.tensor(smooth, dtype=torch.float64).mean(1))


@pytest.mark.parametrize("heads", ["sum", "mean", "max"])
def test_scope_layer_gives_all_heads_one_score(heads):
    """TOVA: the mean over all heads of the layer."""
    raw = over_heads(mean_over_window(LAYER.mass), UNITS["token"]).flatten(0, 1)
    expected = {"sum": raw.sum(0), "mean": raw.mean(0), "max": raw.amax(0)}[heads]
    found = LAYER.scores(contract(access={"kind": "aggregate", "scope": "layer", "head_reducer": heads}))
    same(found, expected.expand(HEADS, -1))


@pytest.mark.parametrize("chosen", [(), (0, 2), (2, 1)])
def test_scope_model_keeps_one_set_in_all_layers(chosen):
    """S(c) = sum over L* of beta_l times the layer's score (arXiv 2605.08234 eq. 11); every layer keeps the same units."""
    layers = [Layer(seed) for seed in range(3)]
    betas = {i: 1.0 + 2 * at for at, i in enumerate(chosen)} if chosen else dict.fromkeys(range(3), 1.0)
    access = {
        "kind": "aggregate",
        "scope": "model",
        "query_reducer": "sum",
        "head_reducer": "sum",
        "layers": list(chosen),
    }
    access["layer_weights"] = list(betas.values()) if chosen else []
    c = contract("mii", access=access)

    def layer_score(layer: Layer) -> Tensor:  # [U], summed over queries and heads
        window = range(TOKENS - WINDOW, TOKENS)
        changes = over_heads(lambda h, g, unit: sum(layer.change(h, g, u, unit) for u in window), UNITS["token"])
        return changes.sum((0, 1))

    total = sum(beta * layer_score(layers[i]) for i, beta in betas.items())
    best = sorted(sorted(range(TOKENS), key=lambda i: -total[i])[:5])
    scored = [score(c, layer.problem(c, 5, index, index, 3)) for index, layer in enumerate(layers)]
    for decision in decide(c, scored):
        assert [kept.tolist() for kept in decision.kept] == [best] * HEADS


@pytest.mark.parametrize(
    ("band", "n_layers", "layers"),
    [
        ((0, 1), 3, [0, 1, 2]),
        ((0.5, 0.8), 24, list(range(12, 19))),
        ((0.5, 0.8), 1, [0]),
        ((0.9, 1), 4, [3]),
        ((0, 0.1), 2, [0]),
    ],
)
def test_a_band_is_layers_by_their_share_of_the_depth(band, n_layers, layers):
    scores = [torch.eye(n_layers)[i] for i in range(n_layers)]
    access = contract(access={"kind": "aggregate", "scope": "model", "band": band}).access
    assert access.combine_layers(scores).nonzero().flatten().tolist() == layers


# --- stops -----------------------------------------------------------------------------------------------------------


def test_a_score_that_is_no_number_stops_the_run():
    layer = Layer()
    layer.values[0, 3, 1] = float("nan")
    with pytest.raises(KvpressError, match=r"layer 4: ranking 'mii'"):
        layer.scores(contract("mii"), index=4)


def test_a_budget_below_the_protection_stops_the_run():
    c = contract(protection={"kind": "standard", "recent": 5})
    with pytest.raises(ContractError, match="protection of 5"):
        score(c, LAYER.problem(c, 4))
    assert score(c, LAYER.problem(c, 5)).base == 0


def test_heads_that_store_different_tokens_score_like_each_head_alone():
    """After an eviction: ragged heads are computed one by one, and padding to the longest never shows."""
    spec = LayerSpec(index=0, group=GROUP, scale=SCALE, output_weight=LAYER.output_weight)
    kept = [torch.tensor([0, 2, 3, 8, 12]), torch.tensor([1, 4, 5, 6, 7, 9, 10, 11])]
    groups = [HeadGroup(LAYER.keys[h : h + 1, at], LAYER.values[h : h + 1, at], at) for h, at in enumerate(kept)]
    for ranking in ("mass", "mii", "vatp", "caote", "criticalkv", "key_norm"):
        c = contract(ranking)
        queries = Queries(LAYER.query, torch.arange(TOKENS), c.query_law.weights(torch.arange(TOKENS), TOKENS))
        together = score(c, Problem(UnitFeatures(spec, groups, 1), queries, None, None, TOKENS, 5, 0, 1)).scores
        for h, at in enumerate(kept):
            alone_spec = replace(spec, output_weight=LAYER.output_weight[h : h + 1])
            alone_queries = Queries(LAYER.query[h : h + 1], queries.positions, queries.weights)
            alone = Problem(UnitFeatures(alone_spec, [groups[h]], 1), alone_queries, None, None, TOKENS, 5, 0, 1)
            same(together[h : h + 1, : at.numel()], score(c, alone).scores)


@pytest.mark.parametrize("of", ["mass", "mii", "vatp", "criticalkv", {"kind": "nolev", "norm_space": "output"}])
def test_jitter_changes_scores_by_epsilon_at_most_and_differs_between_units(of):
    plain, jittered = (
        LAYER.scores(contract(ranking)) for ranking in (of, {"kind": "jittered", "of": of, "epsilon": 1e-3})
    )
    ratio = jittered / plain
    assert bool(((ratio >= 1) & (ratio <= 1 + 1e-3)).all())
    assert len(set(ratio.flatten().tolist())) > ratio.numel() // 2
    same(LAYER.scores(contract({"kind": "jittered", "of": of, "epsilon": 1e-3})), jittered)
    other = LAYER.scores(contract({"kind": "jittered", "of": of, "epsilon": 1e-3, "seed": 1}))
    assert not torch.equal(other, jittered)


def test_jitter_wraps_no_jitter_and_keeps_its_inner_choice_in_the_id():
    with pytest.raises(ContractError, match="wraps any other"):
        contract({"kind": "jittered", "of": "jittered"})
    one, two = (contract({"kind": "jittered", "of": of}) for of in ("mass", "mii"))
    assert one.id != two.id
    assert Contract.build(yaml.safe_load(one.to_yaml())) == one
