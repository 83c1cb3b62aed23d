"""The presets keep the sets that the published algorithms give.

Each algorithm is written here once more from its paper and its authors' code, over the full attention matrices of a
small random Llama with grouped queries in float64, and compared with what is in the store after a prefill.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompts, tiny
from torch import Tensor

import kvpress
from kvpress.contract import preset_names

WINDOW, KERNEL = 32, 7  # of the SnapKV family's presets
HEADS, GROUP = 2, 4
LENGTH = 120
Sets = list[list[list[int]]]  # [layer][KV head] -> ascending positions


@pytest.fixture(scope="module")
def model():
    return tiny("llama", torch.float64)


@pytest.fixture(scope="module")
def attention(model) -> list[Tensor]:
    """The full attention matrices [Hq, n, n] of every layer, from transformers' own eager attention."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return [a[0] for a in model(input_ids=prompt(), output_attentions=True).attentions]
    finally:
        model.set_attn_implementation("sdpa")


def prompt() -> Tensor:
    return prompts(1, LENGTH, seed=3)[0]


def stored(cache, row: int = 0, padding: int = 0) -> Sets:
    """What one row of a cache holds."""
    stores = [layer.storage.store for layer in cache.compressed_layers]
    return [[(s.segment(row * HEADS + h)[2] - padding).tolist() for h in range(HEADS)] for s in stores]


def kept_by(model, preset, budget: float, **options) -> Sets:
    with kvpress.compress(model, preset, budget=budget) as session:
        model.generate(input_ids=prompt(), max_new_tokens=1, do_sample=False, **options)
    return stored(session.cache)


def top(scores: Tensor, k: int) -> list[int]:
    """Indices of the k largest, earlier ones on ties."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def per_kv_head(scores: Tensor) -> Tensor:
    """[Hq, ...] -> mean over each group of query heads [H, ...] (grouped queries share one set; NVIDIA kvpress)."""
    return torch.stack([scores[h * GROUP : (h + 1) * GROUP].mean(0) for h in range(HEADS)])


def snapkv_scores(a: Tensor) -> Tensor:
    """arXiv 2404.14469, Listing 1: sum over the window's queries, over the prefix only, then average pooling. [H, n - W]."""
    votes = a[:, -WINDOW:, :-WINDOW].sum(1)
    n, half = votes.shape[1], KERNEL // 2
    padded = torch.cat([torch.zeros(len(votes), half), votes, torch.zeros(len(votes), half)], 1)
    pooled = torch.stack([padded[:, i : i + KERNEL].sum(1) / KERNEL for i in range(n)], 1)
    return per_kv_head(pooled)


def with_window(chosen: list[int]) -> list[int]:
    return sorted(chosen) + list(range(LENGTH - WINDOW, LENGTH))


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_snapkv(model, attention, budget):
    k = int(budget * LENGTH) - WINDOW
    expected = [[with_window(top(scores, k)) for scores in snapkv_scores(a)] for a in attention]
    assert kept_by(model, "snapkv", budget) == expected


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
def test_streaming_llm(model, budget):
    """arXiv 2309.17453: four attention sinks and the most recent tokens."""
    k = int(budget * LENGTH)
    expected = [0, 1, 2, 3, *range(LENGTH - (k - 4), LENGTH)]
    assert kept_by(model, "streaming_llm", budget) == [[expected] * HEADS] * 3


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("debiased", [False, True])
def test_h2o(model, attention, budget, debiased):
    """arXiv 2306.14048: half of the budget is recent, half are the heavy hitters of attention summed over all queries.

    Debiased: divided by the number of queries that could see the token (arXiv 2605.08234 App. F).
    """
    k = int(budget * LENGTH)
    recent = k // 2
    expected: Sets = []
    for a in attention:
        mass = per_kv_head(a.sum(1))
        if debiased:
            mass = mass / torch.arange(LENGTH, 0, -1)
        heavy = [top(row[: LENGTH - recent], k - recent) for row in mass]
        expected.append([sorted(h) + list(range(LENGTH - recent, LENGTH)) for h in heavy])
    assert kept_by(model, "h2o_debiased" if debiased else "h2o", budget) == expected


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.6])
def test_tova(model, attention, budget):
    """arXiv 2401.06104 (tova_cache.py): the last query's attention averaged over all heads, top k of all tokens."""
    k = int(budget * LENGTH)
    expected = [[sorted(top(a[:, -1].mean(0), k))] * HEADS for a in attention]
    assert kept_by(model, "tova", budget) == expected


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_pyramidkv(model, attention, budget):
    """arXiv 2406.02069: SnapKV's scores with budgets on a line from 2 k - k / 20 down to k / 20, capped at the prefix."""
    k = int(budget * LENGTH) - WINDOW
    last = k / 20
    first = 2 * k - last
    if first > LENGTH - WINDOW:
        first, last = LENGTH - WINDOW, 2 * k - (LENGTH - WINDOW)
    found = kept_by(model, "pyramidkv", budget)
    sizes = [len(heads[0]) - WINDOW for heads in found]
    line = [first - (first - last) * layer / 2 for layer in range(3)]
    assert all(abs(size - exact) < 1 for size, exact in zip(sizes, line, strict=True))
    assert sum(sizes) == 3 * k
    expected = [[with_window(top(s, size)) for s in snapkv_scores(a)] for a, size in zip(attention, sizes, strict=True)]
    assert found == expected


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_adakv(model, attention, budget):
    """arXiv 2407.11550 Algorithm 1 over SnapKV's scores: B_i = 0.2 B / h + 0.8 B*_i, B* the head counts of one top-B."""
    k = int(budget * LENGTH) - WINDOW
    found = kept_by(model, "adakv", budget)
    for heads, a in zip(found, attention, strict=True):
        scores = snapkv_scores(a)
        n = scores.shape[1]
        winners = [index // n for index in top(scores.flatten(), k * HEADS)]
        exact = [0.2 * k + 0.8 * winners.count(h) for h in range(HEADS)]
        sizes = [len(head) - WINDOW for head in heads]
        assert sum(sizes) == k * HEADS
        assert all(abs(size - b) < 1 for size, b in zip(sizes, exact, strict=True))
        assert heads == [with_window(top(scores[h], sizes[h])) for h in range(HEADS)]


def test_adakv_heads_really_differ(model):
    """Otherwise the test above would say nothing about ragged heads."""
    assert any(len(heads[0]) != len(heads[1]) for heads in kept_by(model, "adakv", 0.5))


@pytest.mark.parametrize("preset", ["snapkv", "h2o", "h2o_debiased", "tova", "adakv", "mii_blocks"])
def test_a_chunked_prefill_keeps_the_same_set(model, preset):
    assert kept_by(model, preset, 0.5, prefill_chunk_size=23) == kept_by(model, preset, 0.5)


NEED_NO_EXTRA_PASS = sorted(set(preset_names()) - {"full", "kvzip", "oracle_mass"})


@pytest.mark.parametrize("preset", NEED_NO_EXTRA_PASS)
def test_a_row_of_a_padded_batch_keeps_what_it_keeps_alone(model, preset):
    padding = [0, 17, 40]
    ids, mask = prompts(3, LENGTH, padding, seed=5)
    settings = {"max_new_tokens": 1, "do_sample": False}
    with kvpress.compress(model, preset, budget=0.6) as session:
        model.generate(input_ids=ids, attention_mask=mask, **settings)
    batch = session.cache
    for row, pad in enumerate(padding):
        with kvpress.compress(model, preset, budget=0.6) as session:
            model.generate(input_ids=ids[row : row + 1, pad:], **settings)
        assert stored(batch, row, pad) == stored(session.cache), f"row {row}"


@pytest.mark.parametrize("allocation", ["uniform", "pyramid", "ada", "global"])
def test_every_allocation_stays_within_the_budget_while_generating(model, allocation):
    """Tokens per head never exceed the budget by more than the steps between two evictions, summed over the model."""
    contract = kvpress.Contract.load("snapkv", 0.5).swap(
        allocation=allocation,
        schedule={"kind": "every_decode_steps", "n": 4},
        query_law={"kind": "tail", "window": 4},
        protection={"kind": "standard", "recent": 4},
    )
    ids = prompts(1, 40, seed=8)[0]
    with kvpress.compress(model, contract) as session:
        model.generate(input_ids=ids, max_new_tokens=90, do_sample=False)
    total = sum(len(head) for layer in stored(session.cache) for head in layer)
    assert total <= 3 * HEADS * (20 + 4)
