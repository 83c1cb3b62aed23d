"""One decode step of a large model at a long context: captured and eager, against its byte floor and a static cache.

kvpress bench step --shape llama-3.1-8b --batch 8 --context 32768 --budget 0.25

Weights, keys and values are random: the time of a step does not depend on them. Caches are filled directly, because a
prefill of that size would cost minutes and change nothing. The floor is what a copy of the same size would need: bytes
of weights and of the cache (positions, tables and slack included), over the copy bandwidth measured in the same run. No time is reported when the
logits of the arms differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config, StaticCache
from transformers import __version__ as transformers_version

from kvpress.backend import BackendRequest
from kvpress.cache import CompressedCache
from kvpress.device import DTYPES, pick_device
from kvpress.errors import InputError, KvpressError, unknown
from kvpress.graphs import graphed_decode

ROPE = {"rope_type": "default", "rope_theta": 5e5}
SHAPES: dict[str, Callable[[int], Any]] = {
    "llama-3.1-8b": lambda context: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=context, rope_parameters=ROPE,
    ),
    "qwen2.5-0.5b": lambda context: Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=context, rope_parameters=ROPE, tie_word_embeddings=True,
    ),
    "tiny": lambda context: LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, rope_parameters=ROPE,
    ),
}  # fmt: skip
WARMUP = 3
#: largest relative difference of logits between two ways to the same step
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


@torch.no_grad()
def run_step_bench(
    *,
    shape: str = "llama-3.1-8b",
    batch: int = 8,
    context: int = 32768,
    budget: float = 0.25,
    steps: int = 20,
    dtype: str = "bfloat16",
    request: BackendRequest | None = None,
    static: bool = True,
) -> dict[str, Any]:
    """Seconds of one decode step with `budget` of the context kept, evenly over heads.

    shape: name in SHAPES. request: backend, store and page size of our arms. static: also time transformers' StaticCache
    at the full context under torch.compile, which takes minutes to compile.

    Returns seconds of the arms "captured" (or None unless every step was replayed; `captured_note` says why not),
    "eager" and "static_full", `floor_seconds`, their ratios, the bytes behind them and the setting.

    Raises InputError for an unknown shape, KvpressError where the first or the last logits of "captured" or "eager" differ
    from those of transformers' cache with the same tokens. "static_full" holds other tokens, so only its time is taken.
    """
    if shape not in SHAPES:
        raise InputError(unknown("shape", shape, SHAPES))
    if dtype not in DTYPES or DTYPES[dtype] not in TOLERANCE:
        raise InputError(f"unknown dtype '{dtype}': use float32, float16 or bfloat16")
    device, request = pick_device(None), request or BackendRequest()
    n_kept = int(context * budget)
    if n_kept < 1:
        raise InputError(f"a budget of {budget} keeps none of {context} tokens")
    torch.manual_seed(0)
    with device:
        config = SHAPES[shape](context + 4 * (steps + WARMUP))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    token = torch.ones((batch, 1), dtype=torch.long, device=device)

    n_steps = steps + WARMUP
    reference = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        reference.update(*_random_kv(model, batch, n_kept, layer), layer)
    expected = _race(model, reference, token, context, n_steps)[1]
    del reference

    wants_graphs = request.backend != "torch" and request.store != "packed"
    cache = _filled(model, batch, n_kept, context, request, graphs=wants_graphs)
    kept_bytes = cache.nbytes
    with cache, graphed_decode(model, cache):
        captured, logits = _race(model, cache, token, context, n_steps)
    _check(expected, logits, DTYPES[dtype], "replayed steps")
    report, record = cache.report().to_dict(), cache.plan.graphs
    all_replayed = record is not None and record.replayed == n_steps
    del cache
    with _filled(model, batch, n_kept, context, request, graphs=False) as cache:
        eager, logits = _race(model, cache, token, context, n_steps)
    _check(expected, logits, DTYPES[dtype], "eager steps")
    del cache
    seconds: dict[str, float | None] = {
        "captured": statistics.median(captured) if all_replayed else None,
        "eager": statistics.median(eager),
        "static_full": _static(model, token, batch, context, steps) if static else None,
    }
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not config.tie_word_embeddings:  # only the rows of the tokens are read
        weights -= model.get_input_embeddings().weight.nbytes
    bandwidth = _copy_bandwidth(device)
    floor = (weights + kept_bytes) / bandwidth
    ours = seconds["captured"] or seconds["eager"]
    assert ours is not None
    return {
        "seconds": seconds,
        "floor_seconds": floor,
        "captured_vs_floor": seconds["captured"] / floor if seconds["captured"] else None,
        "eager_vs_floor": statistics.median(eager) / floor,
        "tokens_per_second_vs_static_full": seconds["static_full"] / ours if seconds["static_full"] else None,
        "captured_note": report["decode"],
        "bytes": {"weights_read": weights, "kept_cache": kept_bytes},
        "copy_bytes_per_second": bandwidth,
        "setting": {
            "shape": shape,
            "batch": batch,
            "context": context,
            "budget": budget,
            "kept_tokens": n_kept,
            "dtype": dtype,
            "steps": steps,
            "backend": report["backend"],
            "store": report["store"],
            "page_size": report["page_size"],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
    }


def _random_kv(model: PreTrainedModel, batch: int, n: int, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, n, D] of a layer: the same for the same layer, batch and n."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator(model.device).manual_seed(layer)
    shape = (batch, config.num_key_value_heads, n, head_dim)
    keys, values = (torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype) for _ in range(2))
    return keys, values


def _filled(
    model: PreTrainedModel, batch: int, n_kept: int, context: int, request: BackendRequest, *, graphs: bool
) -> CompressedCache:
    """A cache as it is after a prompt of `context` tokens of which n_kept were kept in every head."""
    wanted = BackendRequest(request.backend, request.store, request.page_size, graphs)
    cache = CompressedCache(model, "full", backend=wanted)
    cache.plan.prompt_length = context
    for layer in cache.compressed_layers:
        keys, values = _random_kv(model, batch, n_kept, layer.index)
        layer.lazy_initialization(keys, values)
        layer.storage.dense, layer.seen = (keys, values), context
        layer.storage.keep(None, n_kept)
    return cache


def _race(
    model: Any, cache: Any, token: Tensor, context: int, n_steps: int
) -> tuple[list[float], tuple[Tensor, Tensor]]:
    """Seconds of the steps behind the warm-up, and the logits of the first and of the last step."""
    seconds, logits = [], []
    for at in range(n_steps):
        positions = torch.full_like(token, context + at)
        _finish(token.device)
        start = time.perf_counter()
        out = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
        _finish(token.device)
        seconds.append(time.perf_counter() - start)
        if at in (0, n_steps - 1):
            logits.append(out.clone())
    return seconds[WARMUP:], (logits[0], logits[-1])


def _static(model: PreTrainedModel, token: Tensor, batch: int, context: int, steps: int) -> float:
    """Seconds of a step with transformers' StaticCache at the full context under torch.compile."""
    cache = StaticCache(config=model.config, max_cache_len=context + steps + WARMUP + 1)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*_random_kv(model, batch, context, layer), layer)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False)
    return statistics.median(_race(compiled, cache, token, context, steps + WARMUP)[0])


def _check(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], dtype: torch.dtype, what: str) -> None:
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    error = max(float((b - a).norm() / a.norm()) for a, b in pairs)
    if not error <= TOLERANCE[dtype]:
        raise KvpressError(
            f"logits of {what} differ from transformers' by {error:.1e} (allowed {TOLERANCE[dtype]:.0e}): no time is "
            f"reported for wrong results"
        )


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the best of ten large copies."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        _finish(device)
        start = time.perf_counter()
        target.copy_(source)
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_step_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `run_step_bench` for people."""
    console, setting = console or Console(), result["setting"]
    console.print(
        f"{setting['shape']}, {setting['dtype']}, batch {setting['batch']} x {setting['context']:,} tokens, "
        f"{setting['kept_tokens']:,} kept, on {setting['device']}; backend {setting['backend']}, {setting['store']} store; "
        f"torch {setting['torch']}, transformers {setting['transformers']}"
    )
    table = Table()
    for name in ("decode step", "ms", "tokens/s", "x the floor"):
        table.add_column(name, justify="left" if name == "decode step" else "right")
    names = {"captured": "captured", "eager": "eager", "static_full": "StaticCache + compile, full cache"}
    rows = [
        *((names[name], seconds) for name, seconds in result["seconds"].items()),
        ("floor", result["floor_seconds"]),
    ]
    for label, seconds in rows:
        if seconds is None:
            table.add_row(label, "not measured", "", "")
        else:
            ratio = f"{seconds / result['floor_seconds']:.2f}"
            table.add_row(label, f"{1e3 * seconds:.2f}", f"{setting['batch'] / seconds:,.0f}", ratio)
    console.print(table)
    console.print(
        f"floor: {result['bytes']['weights_read'] / 1e9:.2f} GB of weights and {result['bytes']['kept_cache'] / 1e9:.2f} GB "
        f"of cache at the copy bandwidth of {result['copy_bytes_per_second'] / 1e12:.2f} TB/s measured here"
    )
    console.print(f"decode: {result['captured_note']}")
