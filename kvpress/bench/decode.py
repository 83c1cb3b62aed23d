"""Decode speed against transformers' own cache and against the floor that the weights set.

kvpress bench decode --context 8192

Six arms take turns, one token each, in one process: transformers' DynamicCache, our cache with everything in it, the same in half of
the dimensions and in eight bits, our cache at a quarter, and a DynamicCache that is almost empty (the floor: what reading the weights
costs). Each reported
time is the median of all rounds, so that a busy moment of the machine hits all arms or none. No time is reported for
arms whose logits differ.
"""

from __future__ import annotations

import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers import __version__ as transformers_version

from kvpress.bench.arms import WARMUP_ROUNDS, Arm, Recorder, make_arms, prefill, race
from kvpress.cache import CompressedCache
from kvpress.device import DTYPES, cpu_has_native_bf16, pick_device
from kvpress.errors import InputError
from kvpress.loading import load

#: a quarter of it must hold what the presets protect
MIN_CONTEXT = 256


@torch.no_grad()
def run_decode_bench(
    *,
    context: int = 8192,
    model: str | None = None,
    dtype: str = "bfloat16",
    steps: int = 16,
    repeats: int = 5,
    seed: int = 0,
    layers: int | None = None,
) -> dict[str, Any]:
    """Measure seconds per decoded token at `context` tokens, and the cost of the evidence in a prefill.

    model: hub id, folder or .gguf file; None builds random weights in the shape of Qwen2.5-0.5B, with `layers` of its
        24 layers if given. dtype: name of a torch dtype. steps * repeats rounds are timed, after a warm-up; the caches
        grow by one token a round. seed: of the weights and of the random token ids.

    Returns the ratios `full_vs_transformers` (transformers' seconds / ours: above 1 is faster), `full_vs_floor`,
    `quarter_vs_floor` and `transformers_vs_floor` (seconds / the floor's: 1 is the floor), `half_rank_vs_full` and `int8_vs_full`
    (seconds / those of the full cache: below 1 is faster), the shares
    `evidence_share_snapkv` and `evidence_share_mii` (evidence and eviction / prefill), and under `seconds`, `gate`,
    `bytes` and `setting` what they come from. All arms take the same token ids.

    Raises InputError for a context the model was not made for, KvpressError where the full cache's logits differ from
    transformers' by more than the dtype explains: then there is no time to report.
    """
    if context < MIN_CONTEXT:
        raise InputError(f"a context of {context} tokens is too short to measure: take at least {MIN_CONTEXT}")
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        rounds = steps * repeats + WARMUP_ROUNDS
        task = progress.add_task("loading the model", total=None)
        made = _random_model(dtype, layers, seed) if model is None else _users_model(model, dtype, layers)
        _check_context(made, context + rounds)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = made.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (1, context + rounds), generator=generator).to(made.device)

        progress.update(task, description=f"prefill of {context:,} tokens under snapkv")
        recorder = Recorder(made, "snapkv", 0.25)
        shares = {"snapkv": prefill(made, recorder, ids[:, :context])}
        arms = make_arms(made, recorder, ids)
        progress.update(task, description=f"prefill of {context:,} tokens under mii")
        with CompressedCache(made, "mii", budget=0.25) as cache:
            shares["mii"] = prefill(made, cache, ids[:, :context])

        progress.update(task, description=f"decoding {rounds} rounds", total=rounds, completed=0)
        gate = race(made, arms, ids[:, context:], lambda: progress.advance(task))
    return _result(made, arms, shares, gate, context, steps, repeats, model, layers, seed)


def _random_model(dtype: str, layers: int | None, seed: int) -> PreTrainedModel:
    """Random weights in the shape of Qwen2.5-0.5B."""
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}': use {', '.join(map(repr, DTYPES))}")
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24 if layers is None else layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.eval().to(pick_device(None))


def _users_model(source: str, dtype: str, layers: int | None) -> PreTrainedModel:
    if layers is not None:
        raise InputError("a number of layers can only be chosen for the random model, not for '" + source + "'")
    return load(source, dtype=dtype)[0].eval()


def _check_context(model: PreTrainedModel, length: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and length > limit:
        raise InputError(
            f"the bench needs {length:,} tokens (context, steps and warm-up), but {type(model).__name__} was made for "
            f"{limit:,}: choose a smaller context"
        )


def _result(
    model: PreTrainedModel,
    arms: dict[str, Arm],
    shares: dict[str, dict[str, float]],
    gate: dict[str, float],
    context: int,
    steps: int,
    repeats: int,
    source: str | None,
    layers: int | None,
    seed: int,
) -> dict[str, Any]:
    seconds = {name: statistics.median(arm.seconds) for name, arm in arms.items()}
    floor = seconds["floor"]
    spread = {
        name: statistics.quantiles(arm.seconds, n=4) if len(arm.seconds) > 1 else [] for name, arm in arms.items()
    }
    return {
        "full_vs_transformers": seconds["transformers"] / seconds["full"],
        "full_vs_floor": seconds["full"] / floor,
        "quarter_vs_floor": seconds["quarter"] / floor,
        "transformers_vs_floor": seconds["transformers"] / floor,
        "half_rank_vs_full": seconds["half_rank"] / seconds["full"],
        "int8_vs_full": seconds["int8"] / seconds["full"],
        **{f"evidence_share_{name}": (s["evidence"] + s["eviction"]) / s["prefill"] for name, s in shares.items()},
        "seconds": {
            **seconds,
            **{
                f"{phase}_{name}": s[phase]
                for name, s in shares.items()
                for phase in ("prefill", "evidence", "eviction")
            },
        },
        "quartiles": {name: [q[0], q[2]] if q else [] for name, q in spread.items()},
        "gate": gate,
        "bytes": {
            **{name: _cache_bytes(arm) for name, arm in arms.items()},
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        },
        "setting": {
            "context": context,
            "dtype": str(model.dtype).removeprefix("torch."),
            "rounds": steps * repeats,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "device": str(model.device),
            "cpu": _cpu_name(),
            "cpu_bf16_native": cpu_has_native_bf16(),
            "attention": model.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "model": source
            or f"random weights, shape of Qwen2.5-0.5B{'' if layers is None else f' cut to {layers} layers'}",
        },
    }


def _cache_bytes(arm: Arm) -> int:
    if arm.ours:
        return int(arm.cache.nbytes)
    return sum(t.nbytes for layer in arm.cache.layers for t in (layer.keys, layer.values))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def print_decode_bench(result: dict[str, Any], console: Console | None = None) -> None:
    """Print the result of `run_decode_bench` for people, on stdout unless another console is given."""
    console = console or Console()
    setting, seconds = result["setting"], result["seconds"]
    console.print(
        f"{setting['model']}, {setting['dtype']}, {setting['context']:,} tokens of context, batch 1, "
        f"{setting['threads']} threads of {setting['cpu']} on {setting['device']}"
        f"{'' if setting['cpu_bf16_native'] else ' (no native bf16)'}, torch {setting['torch']}, "
        f"transformers {setting['transformers']} with {setting['attention']}"
    )
    table = Table()
    for name in ("decode", "ms per token", "tokens/s", "x the floor", "cache MB"):
        table.add_column(name, justify="left" if name == "decode" else "right")
    rows = {
        "transformers": "transformers DynamicCache",
        "full": "kvpress, full budget",
        "half_rank": "kvpress, half of the dimensions",
        "int8": "kvpress, int8",
        "quarter": "kvpress, snapkv at 25 %",
        "floor": "floor: almost empty cache",
    }
    for name, label in rows.items():
        cached = result["bytes"].get(name)
        table.add_row(
            label,
            f"{1e3 * seconds[name]:.1f}",
            f"{1 / seconds[name]:.1f}",
            f"{seconds[name] / seconds['floor']:.2f}",
            "" if cached is None else f"{cached / 1e6:.1f}",
        )
    console.print(table)
    console.print(
        f"full budget: {result['full_vs_transformers']:.2f} times faster than transformers per token; its logits differ by "
        f"{result['gate']['full_logits_error']:.1e} (allowed {result['gate']['tolerance']:.0e})"
    )
    for name in ("snapkv", "mii"):
        console.print(
            f"{name}: evidence and eviction take {result[f'evidence_share_{name}']:.1%} of a prefill of "
            f"{seconds[f'prefill_{name}']:.1f} s ({seconds[f'evidence_{name}']:.2f} s + {seconds[f'eviction_{name}']:.2f} s)"
        )
    console.print(f"medians of {setting['rounds']} rounds in which all take turns")
