"""Freed bytes are gone: counted in the storages, and in what the process's allocator handed out."""

import gc

import pytest
import torch
from tiny_models import COMMON, prompts, tiny
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import kvpress
import kvpress_kernels.reference.window_scores as window_scores_module

LENGTH = 1024
KV_BYTES = 8 * 64 * 2 * 4  # keys and values of one token in one layer: 8 KV heads of 64 in float32


def wide_model(layers):
    """A model whose keys and values outweigh everything else, so that bytes can be told apart."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 4096}
    return LlamaForCausalLM(LlamaConfig(**{**COMMON, **shape, **sizes})).eval()


def allocated(run):
    """(bytes still alive afterwards, peak) of CPU allocations during run(), from the allocator's own events."""
    gc.collect()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        kept = run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return live, peak


def prefill(model, cache):
    def run():
        model(input_ids=prompts(1, LENGTH)[0], past_key_values=cache, logits_to_keep=1)
        return cache

    return run


@pytest.fixture(params=["packed", "paged"])
def request_(request):
    """Both stores, pages at their default size."""
    return kvpress.BackendRequest(store=request.param)


def test_bytes_after_prefill_are_a_quarter(request_):
    """At 25 %: nbytes, and what the allocator still holds, are at or under a quarter plus the protected tokens."""
    model = wide_model(4)
    full = 4 * LENGTH * KV_BYTES
    dynamic_live, _ = allocated(prefill(model, DynamicCache(config=model.config)))
    assert full <= dynamic_live <= full * 1.01, "the measure finds transformers' cache"
    protected = 32 * 4 * KV_BYTES
    for name in ("snapkv", "adakv", "mii", "kvzip", "streaming_llm"):
        contract = kvpress.Contract.load(name)
        if name == "kvzip":
            contract = contract.swap(query_law={"kind": "reconstruction", "instruction": "", "continuation": ""})
        with kvpress.CompressedCache(model, contract, backend=request_) as cache:
            live, _ = allocated(prefill(model, cache))
            assert cache.nbytes <= 0.25 * full + protected
            assert live <= 0.25 * full + protected, name


def test_peak_during_prefill_is_one_layer(request_):
    """Beside the compressed rest only one layer is there in full: the peak grows by compressed layers, not by full ones.

    A forward pass without any cache holds one layer's keys and values too; that is the yardstick.
    """
    without_cache = allocated(lambda: wide_model_8(input_ids=prompts(1, LENGTH)[0], use_cache=False, logits_to_keep=1))[
        1
    ]
    with kvpress.CompressedCache(wide_model_8, "snapkv", backend=request_) as cache:
        _, peak = allocated(prefill(wide_model_8, cache))
        scratch = 3 * 8 * 32 * LENGTH * 4  # a few tensors of window x prompt, per head, in float32
        assert peak <= without_cache + cache.nbytes + scratch
    full_peak = allocated(prefill(wide_model_8, DynamicCache(config=wide_model_8.config)))[1]
    assert full_peak >= without_cache + 7 * LENGTH * KV_BYTES, "the yardstick tells a full cache apart"


wide_model_8 = wide_model(8)


def test_bytes_stay_bounded_over_2000_generated_tokens(request_):
    model = tiny("llama", layers=1)
    contract = kvpress.Contract.load("snapkv").swap(
        budget={"kind": "tokens", "value": 64}, schedule={"kind": "every_decode_steps", "n": 32}
    )
    ids, _ = prompts(1, 200)
    sizes = []
    with torch.no_grad(), kvpress.CompressedCache(model, contract, backend=request_) as cache:
        token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(2000):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            sizes.append(cache.nbytes)
        assert cache.get_seq_length() == 2200
        assert max(cache.compressed_layers[0].storage.store.lengths) <= 64 + 32
    assert max(sizes[1000:]) <= max(sizes[:200])


def test_nbytes_is_the_sum_of_the_real_storages(request_):
    model = tiny("llama")
    with torch.no_grad(), kvpress.CompressedCache(model, "adakv", budget=0.5, backend=request_) as cache:
        model(input_ids=prompts(2, 100)[0], past_key_values=cache)
        for _ in range(3):
            model(input_ids=prompts(2, 1)[0], past_key_values=cache)
        stores = [layer.storage.store for layer in cache.compressed_layers]
        if request_.store == "packed":
            tensors = [t for store in stores for t in (store.keys, store.values, store.positions)]
        else:
            tensors = [t for store in stores for t in (store.table.device, store.device_lengths)]
            for pool in cache.plan.pools.values():
                tensors += [pool.pages.anchor, *pool.pages.slabs]
        assert cache.nbytes == sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )
        report = cache.report().to_dict()
        assert report["cache_bytes"] == cache.nbytes
        in_use = sum(head["bytes_after"] for layer in report["layers"] for head in layer["heads"])
        assert report["index_bytes"] >= 4 * in_use // (2 * 16 * 4 + 4)
        if request_.store == "packed":
            assert in_use + report["slack_bytes"] == cache.nbytes
        else:
            tables = [t for store in stores for t in (store.table.device, store.device_lengths)]
            anchors = [pool.pages.anchor for pool in cache.plan.pools.values()]
            assert in_use + report["slack_bytes"] + sum(t.nbytes for t in tables + anchors) == cache.nbytes


@pytest.mark.parametrize("value", [200_000, 400_000])
def test_a_budget_in_bytes_is_kept(value, request_):
    model = tiny("llama")
    with (
        torch.no_grad(),
        kvpress.CompressedCache(model, "snapkv", budget={"kind": "bytes", "value": value}, backend=request_) as cache,
    ):
        model(input_ids=prompts(1, 900)[0], past_key_values=cache)
        step = 1 if request_.store == "packed" else 32  # whole tokens, or whole pages
        one_step_everywhere = step * 3 * 2 * (2 * 16 * 4 + 4)
        assert value - one_step_everywhere * 1.1 < cache.nbytes <= value


def test_evidence_is_computed_in_bounded_pieces(monkeypatch):
    """With a small bound the same decision comes out, from smaller pieces."""
    model = tiny("llama", torch.float64)
    ids, _ = prompts(1, 300)

    def positions():
        with torch.no_grad(), kvpress.CompressedCache(model, "mii", budget=0.3) as cache:
            model(input_ids=ids, past_key_values=cache)
            return [p.tolist() for layer in cache.compressed_layers for _, _, p in layer.storage.store.segments()]

    expected = positions()
    monkeypatch.setitem(window_scores_module.CHUNK_ELEMENTS, "cpu", 1 << 11)
    assert positions() == expected
