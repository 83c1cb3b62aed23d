"""Attaching and detaching: nothing is left on a model, and sessions do not disturb each other."""

import gc
import weakref

import pytest
import torch
from tiny_models import prompts, tiny
from transformers import AutoModelForCausalLM, DynamicCache

import kvpress
from kvpress.errors import InputError, KvpressError

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def state_of(model):
    """What attaching could leave behind."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return sorted(model.__dict__), hooks, model.config._attn_implementation, model.generate.__func__


def test_nothing_is_left_on_the_model():
    model = tiny("llama")
    before = state_of(model)
    ids, _ = prompts(1, 60)
    with kvpress.compress(model, "snapkv", budget=0.75):
        model.generate(input_ids=ids, **GREEDY)
        assert state_of_differs(model, before)
    assert state_of(model) == before


def state_of_differs(model, before):
    return sorted(model.__dict__) != before[0] and model.config._attn_implementation != before[2]


def test_nothing_is_left_after_an_error():
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(InputError), kvpress.compress(model, "snapkv", budget=0.75):
        model.generate(input_ids=prompts(1, 60)[0], output_attentions=True, return_dict_in_generate=True, **GREEDY)
    assert state_of(model) == before


def test_an_explicit_cache_detaches_when_it_is_collected():
    model = tiny("llama")
    before = state_of(model)
    cache = kvpress.CompressedCache(model, "full")
    model.generate(input_ids=prompts(1, 20)[0], past_key_values=cache, **GREEDY)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert state_of(model) == before


def test_a_cache_frees_its_memory_without_the_cycle_collector():
    model = tiny("llama")
    gc.disable()
    try:
        cache = kvpress.CompressedCache(model, "full")
        with torch.no_grad():
            model(input_ids=prompts(1, 20)[0], past_key_values=cache)
        gone = weakref.ref(cache.compressed_layers[0].storage.store)
        cache.close()
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_two_models_and_two_contracts_side_by_side():
    """Two models that even share one config object, under different contracts at the same time."""
    first = tiny("llama")
    torch.manual_seed(5)
    second = AutoModelForCausalLM.from_config(first.config).eval()
    second.config = first.config
    ids, _ = prompts(1, 60)

    def alone(model, contract):
        with kvpress.compress(model, contract, budget=0.7) as session:
            return model.generate(input_ids=ids, **GREEDY), session.report().to_dict()["kept_tokens"]

    expected = alone(first, "snapkv"), alone(second, "streaming_llm")
    with kvpress.compress(first, "snapkv", budget=0.7) as a, kvpress.compress(second, "streaming_llm", budget=0.7) as b:
        got_second, got_first = second.generate(input_ids=ids, **GREEDY), first.generate(input_ids=ids, **GREEDY)
    assert torch.equal(got_first, expected[0][0])
    assert torch.equal(got_second, expected[1][0])
    assert a.report().to_dict()["kept_tokens"] == expected[0][1]
    assert b.report().to_dict()["contract"] == "streaming_llm"
    assert first.config._attn_implementation == "sdpa"


@torch.no_grad()  # around both generators: inside them it would be switched off in one order and on in another
def test_two_contracts_on_one_model_token_by_token():
    """Two caches of one model, their steps interleaved, give what each gives alone."""
    model = tiny("llama")
    ids, _ = prompts(1, 60)

    def steps(cache):
        out = model(input_ids=ids, past_key_values=cache).logits[:, -1]
        yield out
        for _ in range(4):
            out = model(input_ids=out.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
            yield out

    def alone(contract):
        with kvpress.CompressedCache(model, contract, budget=0.7) as cache:
            return torch.stack(list(steps(cache)))

    expected = alone("snapkv"), alone("knorm")
    with (
        kvpress.CompressedCache(model, "snapkv", budget=0.7) as a,
        kvpress.CompressedCache(model, "knorm", budget=0.7) as b,
    ):
        pairs = list(zip(steps(a), steps(b), strict=True))
    assert torch.equal(torch.stack([x for x, _ in pairs]), expected[0])
    assert torch.equal(torch.stack([y for _, y in pairs]), expected[1])


def test_an_attached_model_serves_other_caches_as_before():
    model = tiny("llama")
    ids, mask = prompts(2, 30, [7, 0])
    expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    with kvpress.CompressedCache(model, "snapkv"):
        got = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config), **GREEDY
        )
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **GREEDY), expected)
    assert torch.equal(got, expected)


def test_eager_attention_is_served_too():
    model = tiny("qwen2")
    ids, mask = prompts(2, 30, [7, 0])
    model.set_attn_implementation("eager")
    try:
        expected = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        with kvpress.compress(model, "full"):
            assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")


def test_nested_sessions_use_the_inner_contract():
    model = tiny("llama")
    ids, _ = prompts(1, 60)
    with kvpress.compress(model, "full") as outer:
        with kvpress.compress(model, "streaming_llm", budget=0.5) as inner:
            model.generate(input_ids=ids, **GREEDY)
        model.generate(input_ids=ids, **GREEDY)
    assert inner.report().to_dict()["contract"] == "streaming_llm"
    assert outer.report().to_dict()["contract"] == "full"


def test_a_closed_cache_says_so():
    model = tiny("llama")
    with torch.no_grad():
        cache = kvpress.CompressedCache(model, "full")
        model(input_ids=prompts(1, 10)[0], past_key_values=cache)
        cache.close()
        with pytest.raises(KvpressError, match="closed"):
            model(input_ids=prompts(1, 1)[0], past_key_values=cache)


def test_report_before_anything_ran():
    with pytest.raises(KvpressError, match="nothing to report"), kvpress.compress(tiny("llama"), "full") as session:
        session.report()


def test_gradients_may_be_on_and_a_cache_can_be_reset():
    """A forward pass outside torch.no_grad works, and after reset the same cache gives the same again."""
    model = tiny("llama")
    ids, _ = prompts(1, 60)
    with kvpress.CompressedCache(model, "mii", budget=0.7) as cache:
        runs = []
        for _ in range(2):
            first = model(input_ids=ids, past_key_values=cache).logits[:, -1]
            second = model(input_ids=ids[:, :1], past_key_values=cache).logits[:, -1]
            runs.append((first.detach(), second.detach(), cache.report().to_dict()["kept_tokens"]))
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.nbytes == 0
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_the_table_of_a_report_fits_a_terminal():
    with kvpress.compress(tiny("llama"), "snapkv", budget=0.6) as session:
        tiny("llama").generate(prompts(1, 100)[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    lines = str(session.report()).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.lstrip().startswith("layer")) :]
    assert len(table) == 1 + 3
    assert max(map(len, table)) <= 80
