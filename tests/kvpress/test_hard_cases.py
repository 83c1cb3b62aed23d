"""Cases that went wrong once: padding in odd places, interrupted passes, unusual settings, copies, inference mode."""

import copy

import pytest
import torch
from generation_support import kept, small
from tiny_models import prompts, tiny

import kvpress
from kvpress.errors import InputError, KvpressError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("store")

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def positions(cache):
    """Kept places among a row's real tokens, per layer and segment."""
    return [
        [
            layer.storage.positions(i // layer.storage.n_heads, p.long()).tolist()
            for i, (_, _, p) in enumerate(layer.storage.store.segments())
        ]
        for layer in cache.compressed_layers
    ]


@pytest.mark.parametrize("name", ["snapkv", "h2o", "mii"])
@pytest.mark.parametrize("schedule", ["end_of_prefill", "per_prefill_chunk"])
@pytest.mark.parametrize("chunk", [1, 8])
def test_a_row_that_is_all_padding_in_the_first_chunks(name, schedule, chunk):
    model = tiny("llama", torch.float64)
    contract = small(name, schedule={"kind": schedule}, budget={"kind": "tokens", "value": 24})
    ids, mask = prompts(2, 48, [21, 0])
    with kvpress.compress(model, contract) as session:
        both = model.generate(input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk, **GREEDY)
    places = positions(session.cache)
    assert all(min(segment) >= 0 for layer in places for segment in layer), "padding is never stored"
    if schedule == "end_of_prefill":
        with kvpress.compress(model, contract) as alone:
            expected = model.generate(input_ids=ids[:1, 21:], **GREEDY)
        assert torch.equal(both[0, 48:], expected[0, 27:])
        assert [layer[:2] for layer in places] == positions(alone.cache)


def test_second_turn_with_padded_new_tokens_equals_the_row_alone():
    model, contract = tiny("llama", torch.float64), small("snapkv")
    first, first_mask = prompts(2, 48, [9, 0])
    new, new_mask = prompts(2, 20, [12, 0], seed=5)

    def turns(rows, first_columns, new_columns):
        ids, mask = first[rows][:, first_columns], first_mask[rows][:, first_columns]
        with kvpress.CompressedCache(model, contract) as cache:
            out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
            answer = out[:, ids.shape[1] :]
            ids = torch.cat([out, new[rows][:, new_columns]], 1)
            mask = torch.cat([mask, torch.ones_like(answer), new_mask[rows][:, new_columns]], 1)
            out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
            return out[:, ids.shape[1] :], positions(cache)

    tokens, places = turns(slice(0, 2), slice(None), slice(None))
    alone, alone_places = turns(slice(0, 1), slice(9, None), slice(12, None))
    assert torch.equal(tokens[0], alone[0])
    assert [layer[:2] for layer in places] == alone_places


def test_a_saved_default_of_use_cache_false():
    model = tiny("llama")
    ids, _ = prompts(1, 40)
    expected = model.generate(input_ids=ids, **GREEDY)
    model.generation_config.use_cache = False
    try:
        with kvpress.compress(model, "full") as session:
            assert torch.equal(model.generate(input_ids=ids, **GREEDY), expected)
        assert session.cache.get_seq_length() == 47
    finally:
        model.generation_config.use_cache = True


def test_a_saved_cache_implementation_is_refused():
    model = tiny("llama")
    model.generation_config.cache_implementation = "static"
    try:
        with pytest.raises(InputError, match="cache_implementation"), kvpress.compress(model, "full"):
            model.generate(input_ids=prompts(1, 10)[0], **GREEDY)
    finally:
        model.generation_config.cache_implementation = None


def test_an_absolute_budget_holds_the_answer_too():
    """60 tokens are 60 tokens, however short the prompt was."""
    model = tiny("llama")
    contract = small("snapkv", budget={"kind": "tokens", "value": 60}, schedule={"kind": "every_decode_steps", "n": 8})
    with kvpress.compress(model, contract) as session:
        model.generate(input_ids=prompts(1, 20)[0], **{**GREEDY, "max_new_tokens": 80})
    assert 60 <= session.cache.compressed_layers[0].storage.store.lengths[0] <= 68


def test_a_pass_that_stopped_half_way_is_noticed():
    model = tiny("llama")
    with kvpress.CompressedCache(model, "snapkv", budget=0.25) as cache:
        with pytest.raises(KvpressError, match="protection"):
            model.generate(input_ids=prompts(1, 40)[0], past_key_values=cache, **GREEDY)
        with pytest.raises(KvpressError, match="half-way"):
            model.generate(input_ids=prompts(1, 400)[0], past_key_values=cache, **GREEDY)
        cache.reset()
        model.generate(input_ids=prompts(1, 400)[0], past_key_values=cache, **GREEDY)


def test_prefill_in_inference_mode_and_decode_outside():
    model = tiny("llama")
    ids, _ = prompts(1, 60)
    with kvpress.CompressedCache(model, "knorm", budget=0.5) as cache:
        with torch.inference_mode():
            model(input_ids=ids, past_key_values=cache)
            model(input_ids=ids[:, :1], past_key_values=cache)
        with torch.no_grad():
            model(input_ids=ids[:, :1], past_key_values=cache)
        assert cache.get_seq_length() == 62


@pytest.mark.parametrize("name", ["kvzip", "oracle_mass"])
def test_extra_passes_ignore_a_draft(name):
    """Greedy and assisted decoding ask about the same context."""
    model, contract = tiny("llama", torch.float64), small(name)
    ids, _ = prompts(1, 64)
    results = []
    for extra in ({}, {"assistant_model": tiny("llama", torch.float64, layers=1)}):
        with kvpress.compress(model, contract, reference=prompts(1, 5, seed=2)[0]) as session:
            model.generate(input_ids=ids, **GREEDY, **extra)
        results.append([[p for p in head if p < 64] for layer in kept(session) for head in layer])
    assert results[0] == results[1]


def test_oracle_with_beams_and_several_sequences():
    model, contract = tiny("llama"), small("oracle_mass")
    ids, _ = prompts(2, 40)
    with kvpress.compress(model, contract, reference=prompts(2, 5)[0]):
        out = model.generate(input_ids=ids, num_beams=3, num_return_sequences=2, **GREEDY)
    assert out.shape[0] == 4


@pytest.mark.parametrize("reference", [torch.tensor([5, 6]), torch.tensor([[5, 10_000]])])
def test_a_reference_of_the_wrong_form(reference):
    with (
        pytest.raises(InputError, match="reference"),
        kvpress.compress(tiny("llama"), small("oracle_mass"), reference=reference),
    ):
        tiny("llama").generate(input_ids=prompts(3, 40)[0][:1], **GREEDY)


def test_a_later_prompt_that_is_kept_in_full_is_reported():
    model, contract = tiny("llama"), small("kvzip")
    with kvpress.CompressedCache(model, contract) as cache:
        out = model.generate(input_ids=prompts(1, 64)[0], past_key_values=cache, **GREEDY)
        model.generate(input_ids=torch.cat([out, prompts(1, 30)[0]], 1), past_key_values=cache, **GREEDY)
        assert cache.report().to_dict()["turns_kept_in_full"] == 1
        assert "1 later prompts kept in full" in str(cache.report())


def test_frozen_context_on_a_hybrid_model():
    """Sliding-window layers can be cropped back after freeze; without it one sentence, and nothing is changed."""
    model = tiny("gemma3")
    context, question = prompts(1, 60)[0], prompts(1, 7, seed=3)[0]
    ids = torch.cat([context, question], 1)

    def ask(cache):
        return model.generate(input_ids=ids, past_key_values=cache, **GREEDY)

    with torch.no_grad(), kvpress.CompressedCache(model, small("snapkv")) as cache:
        model(input_ids=context, past_key_values=cache)
        with pytest.raises(KvpressError, match="freeze"):
            cache.crop(-5)
        assert cache.get_seq_length() == 60
        cache.freeze()
        first = ask(cache)
        cache.crop(60 - cache.get_seq_length())
        assert torch.equal(ask(cache), first)


def test_a_copy_of_an_attached_model_works_on_its_own():
    model = tiny("llama")
    ids, _ = prompts(1, 20)
    with kvpress.compress(model, "full"):
        expected = model.generate(input_ids=ids, **GREEDY)
        other = copy.deepcopy(model)
        assert torch.equal(other.generate(input_ids=ids, **GREEDY), expected)


def test_the_users_choice_of_attention_survives_detaching():
    model = tiny("qwen2")
    with kvpress.compress(model, "full"):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")


def test_positional_arguments_reach_the_cache():
    """A cache given by position is served like one given by name, extra pass included."""
    model, contract = tiny("llama"), small("kvzip")
    ids, mask = prompts(1, 64)
    with torch.no_grad(), kvpress.CompressedCache(model, contract) as cache:
        model(ids, mask, None, cache)
        assert cache.compressed_layers[0].storage.store is not None


def test_flex_attention_is_refused():
    model = tiny("qwen2")
    model.config._attn_implementation_internal = "flex_attention"
    try:
        with pytest.raises(UnsupportedModelError, match="flex_attention"):
            kvpress.compress(model, "full")
    finally:
        model.config._attn_implementation_internal = "sdpa"


def test_evidence_of_evicted_tokens_is_let_go():
    """What a cumulative law carries never outgrows what is stored."""
    model = tiny("llama")
    contract = small("h2o", budget={"kind": "tokens", "value": 20}, schedule={"kind": "every_decode_steps", "n": 8})
    with kvpress.compress(model, contract) as session:
        model.generate(input_ids=prompts(1, 200)[0], **{**GREEDY, "max_new_tokens": 40})
    for layer in session.cache.compressed_layers:
        carried = layer.evidence.carried[0]
        assert all(starts.numel() <= 20 for starts in carried.starts)


def test_growth_moves_the_store_rarely(store):
    """Segments of unequal length grow together: a move every 16 tokens, not one for each segment."""
    if store == "paged":
        pytest.skip("pages never move; test_paged_store.py counts the changes of the table")
    model = tiny("llama")
    with torch.no_grad(), kvpress.CompressedCache(model, small("adakv")) as cache:
        model(input_ids=prompts(2, 100, [17, 0])[0], past_key_values=cache)
        store, moves = cache.compressed_layers[0].storage.store, 0
        for _ in range(64):
            before = store.keys.data_ptr()
            model(input_ids=prompts(2, 1)[0], past_key_values=cache)
            moves += store.keys.data_ptr() != before
    assert moves <= 5
