"""What attention sees after eviction is the full cache restricted to the kept set: for every preset, in float64.

The reference keeps transformers' full cache and masks, per layer, row and KV head, everything that was evicted.
"""

import pytest
import torch
from tiny_models import VOCABULARY, prompts, tiny
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import kvpress

pytestmark = pytest.mark.usefixtures("store")

DECODE_STEPS = 5
kept_sets: dict[int, torch.Tensor] = {}  # layer -> [B, Hkv, columns] bool, read by the reference attention


def restricted_attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
    """Plain attention over the full cache with a mask per KV head; sliding layers use their ordinary mask."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    kept = kept_sets.get(module.layer_idx)
    if kept is not None:
        logits = logits.masked_fill(~kept.repeat_interleave(group, 1)[:, :, None], -torch.inf)
    elif attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:
        sink = s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        probs = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    else:
        probs = torch.softmax(logits, -1)
    return (probs @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("restricted", restricted_attention)
AttentionMaskInterface.register("restricted", sdpa_mask)


def contract_for(name):
    """The preset at half the cache, with protections that fit a short prompt."""
    contract = kvpress.Contract.load(name, 1.0 if name == "full" else 0.5)
    if contract.protection.kind == "standard" and contract.protection.recent > 8:
        contract = contract.swap(protection={**contract.protection.model_dump(), "recent": 8})
    if name == "kvzip":
        law = {"kind": "reconstruction", "chunk": 16, "instruction": "", "continuation": ""}
        contract = contract.swap(query_law=law)
    if name == "mii_blocks":
        contract = contract.swap(granularity={"kind": "block", "size": 4})
    return contract


def kept_columns(cache, n_columns):
    """layer -> [B, Hkv, n_columns] bool of what is stored now."""
    found = {}
    for layer in cache.compressed_layers:
        store = layer.storage.store
        mask = torch.zeros(store.n_rows, store.n_heads, n_columns, dtype=torch.bool)
        for index, (_, _, positions) in enumerate(store.segments()):
            mask[index // store.n_heads, index % store.n_heads, positions.long()] = True
        found[layer.index] = mask
    return found


def compare(model, contract, ids, mask, atol=1e-9, **options):
    """Decode a few fixed tokens with the compressed cache and with the reference; returns the largest difference."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, VOCABULARY, (ids.shape[0], DECODE_STEPS), generator=generator)
    steps, sets = [], []
    with torch.no_grad():
        with kvpress.CompressedCache(model, contract, **options) as cache:
            prefill = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
            for at in range(DECODE_STEPS):
                full = torch.cat([mask, torch.ones_like(tokens[:, : at + 1])], 1)
                positions = (full.cumsum(1) - 1)[:, -1:]
                out = model(
                    input_ids=tokens[:, at : at + 1], attention_mask=full, position_ids=positions, past_key_values=cache
                )
                steps.append(out.logits[:, -1])
                sets.append(kept_columns(cache, full.shape[1]))
        reference = DynamicCache(config=model.config)
        expected = model(input_ids=ids, attention_mask=mask, past_key_values=reference).logits[:, -1]
        torch.testing.assert_close(prefill, expected, atol=atol, rtol=0)
        model.set_attn_implementation("restricted")
        try:
            for at in range(DECODE_STEPS):
                kept_sets.update(sets[at])
                full = torch.cat([mask, torch.ones_like(tokens[:, : at + 1])], 1)
                positions = (full.cumsum(1) - 1)[:, -1:]
                out = model(
                    input_ids=tokens[:, at : at + 1],
                    attention_mask=full,
                    position_ids=positions,
                    past_key_values=reference,
                )
                torch.testing.assert_close(steps[at], out.logits[:, -1], atol=atol, rtol=0)
        finally:
            kept_sets.clear()
            model.set_attn_implementation("sdpa" if model.config.model_type != "gpt_oss" else "eager")
    return sets


@pytest.mark.parametrize("name", kvpress.preset_names())
def test_every_preset_on_a_padded_batch(name):
    model = tiny("llama", torch.float64)
    ids, mask = prompts(3, 60, [0, 13, 22])
    reference = prompts(3, 5, seed=9)[0] if name == "oracle_mass" else None
    sets = compare(model, contract_for(name), ids, mask, reference=reference)
    kept = torch.stack([layer.sum(-1) for layer in sets[0].values()])  # [L, B, H]
    if name != "full":
        real = mask.sum(1) + 1
        assert (kept.double().mean((0, 2)) <= 0.5 * real + 1.5).all(), "the budget holds on average over heads"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "kvzip"])
def test_other_families(family, name):
    model = tiny(family, torch.float64)
    ids, mask = prompts(2, 60, [0, 13])
    compare(model, contract_for(name), ids, mask, atol=1e-8)


def test_learned_sinks():
    model = tiny("gpt_oss", torch.float64)
    ids, mask = prompts(2, 60, [0, 13])
    for name in ("snapkv", "adakv", "mii"):
        compare(model, contract_for(name), ids, mask, atol=1e-8)


def test_heads_are_really_ragged():
    """The ragged presets give heads different lengths, so the cases above mean something."""
    sets = compare(tiny("llama", torch.float64), contract_for("adakv"), *prompts(2, 60, [0, 13]))
    assert len({int(n) for layer in sets[0].values() for n in layer.sum(-1).flatten()}) > 3


@pytest.mark.parametrize(
    "swap",
    [
        {"schedule": {"kind": "every_decode_steps", "n": 2}},
        {"schedule": {"kind": "after_decode_steps", "n": 3}},
        {"schedule": {"kind": "every_decode_steps", "n": 1}, "query_law": {"kind": "all"}},
        {
            "schedule": {"kind": "after_decode_steps", "n": 2},
            "query_law": {"kind": "first_decode_steps", "n": 2},
        },
        {
            "granularity": {"kind": "block", "size": 4},
            "retention": {"kind": "blocks_token_fill"},
            "schedule": {"kind": "every_decode_steps", "n": 2},
        },
    ],
    ids=["every", "after", "h2o", "delayed", "blocks"],
)
def test_eviction_while_decoding(swap):
    sets = compare(tiny("llama", torch.float64), contract_for("snapkv").swap(**swap), *prompts(2, 60, [0, 13]))
    first, last = (next(iter(s.values())).sum(-1).float().mean() for s in (sets[0], sets[-1]))
    assert last <= 35, "half of the prompt and what came since the last eviction"
    if swap["schedule"]["kind"] == "after_decode_steps":
        assert first > 50, "nothing is evicted before its time"


@pytest.mark.parametrize("name", kvpress.preset_names())
def test_a_row_in_a_padded_batch_is_decided_like_the_row_alone(name):
    """Same kept positions and the same tokens, whatever the neighbours and the padding."""
    model, contract = tiny("llama", torch.float64), contract_for(name)
    ids, mask = prompts(3, 60, [0, 13, 22])
    reference = prompts(3, 5, seed=9)[0]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def run(rows, columns):
        inputs = {"input_ids": ids[rows][:, columns], "attention_mask": mask[rows][:, columns]}
        with kvpress.compress(model, contract, reference=reference[rows]) as session:
            tokens = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        layers = session.cache.compressed_layers
        kept = [
            [
                layer.storage.positions(index // 2, p.long()).tolist()
                for index, (_, _, p) in enumerate(layer.storage.store.segments())
            ]
            for layer in layers
        ]
        return tokens, kept

    tokens, kept = run(slice(0, 3), slice(None))
    for row, padding in enumerate([0, 13, 22]):
        alone_tokens, alone_kept = run(slice(row, row + 1), slice(padding, None))
        assert torch.equal(alone_tokens[0], tokens[row])
        assert alone_kept == [layer[2 * row : 2 * row + 2] for layer in kept]
