"""The decode bench: what it returns, and that it prints no time for wrong results. Speed itself is not asserted."""

import io

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2Config

from kvpress.bench import arms, decode
from kvpress.bench.decode import print_decode_bench, run_decode_bench
from kvpress.cache.layer import CompressedLayer
from kvpress.errors import InputError, KvpressError

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.fixture
def tiny(monkeypatch):
    """Let the bench build a small model instead of the 0.5B shape."""

    def build(dtype, layers, seed):
        config = Qwen2Config(**TINY, sliding_window=32, max_window_layers=2, use_sliding_window=True)
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()

    monkeypatch.setattr(decode, "_random_model", build)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_keys_ratios_and_table(tiny, dtype):
    result = run_decode_bench(context=256, dtype=dtype, steps=3, repeats=2)
    seconds = result["seconds"]
    assert result["full_vs_transformers"] == seconds["transformers"] / seconds["full"]
    for name in ("full", "quarter", "transformers"):
        assert result[f"{name}_vs_floor"] == seconds[name] / seconds["floor"]
    for name in ("snapkv", "mii"):
        share = (seconds[f"evidence_{name}"] + seconds[f"eviction_{name}"]) / seconds[f"prefill_{name}"]
        assert result[f"evidence_share_{name}"] == share > 0
    assert result["gate"]["full_logits_error"] <= result["gate"]["tolerance"]
    for name in ("half_rank", "int8"):
        assert result[f"{name}_vs_full"] == seconds[name] / seconds["full"]
        assert result["bytes"][name] < result["bytes"]["full"]
    assert result["bytes"]["quarter"] < result["bytes"]["full"]
    assert {"context", "dtype", "threads", "cpu", "torch", "transformers", "model", "cpu_bf16_native"} <= set(
        result["setting"]
    )
    text = io.StringIO()
    print_decode_bench(result, Console(file=text, width=200))
    assert "256 tokens of context" in text.getvalue()
    assert "x the floor" in text.getvalue()


def test_the_model_is_left_as_it_was(tiny, monkeypatch):
    made = []
    build = decode._random_model
    monkeypatch.setattr(decode, "_random_model", lambda *args: made.append(build(*args)) or made[0])
    run_decode_bench(context=256, dtype="float32", steps=1, repeats=1)
    assert made[0].config._attn_implementation == "sdpa"
    assert not made[0]._forward_hooks
    assert "generate" not in vars(made[0])


def test_wrong_logits_give_no_time(tiny, monkeypatch):
    plain = CompressedLayer._attend_packed
    monkeypatch.setattr(CompressedLayer, "_attend_packed", lambda *args: plain(*args) * 1.5)
    with pytest.raises(KvpressError, match="no time is reported"):
        run_decode_bench(context=256, dtype="float32", steps=1, repeats=1)


def test_full_arm_holds_what_transformers_holds(tiny):
    """Filling the full cache from another cache's prefill gives the tensors that its own prefill would."""
    model = decode._random_model("float32", None, 0)
    ids = torch.randint(97, (1, 256))
    recorder = arms.Recorder(model, "snapkv", 0.25)
    with torch.no_grad():
        arms.prefill(model, recorder, ids)
        made = arms.make_arms(model, recorder, ids)
    full, theirs = made["full"].cache, made["transformers"].cache
    assert full.get_seq_length() == theirs.get_seq_length() == 256
    for layer in full.compressed_layers:
        store = layer.storage.store
        assert store.lengths == [256, 256]
        assert torch.equal(store.keys.view(1, 2, 256, -1), theirs.layers[layer.index].keys)
        assert torch.equal(store.values.view(1, 2, 256, -1), theirs.layers[layer.index].values)


def test_refusals(tiny):
    with pytest.raises(InputError, match="was made for 512"):
        run_decode_bench(context=511, dtype="float32", steps=1, repeats=1)
    with pytest.raises(InputError, match="at least 256"):
        run_decode_bench(context=255, dtype="float32")
    with pytest.raises(InputError, match="number of layers"):
        run_decode_bench(model="somewhere", layers=2)


def test_random_model_has_the_shape_of_qwen():
    model = decode._random_model("bfloat16", 1, 0)
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[0]
    assert [tuple(p.weight.shape) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.up_proj)] == [
        (14 * 64, 896),
        (2 * 64, 896),
        (4864, 896),
    ]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(InputError, match="unknown dtype"):
        decode._random_model("int3", 1, 0)
