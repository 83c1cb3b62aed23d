"""The arms of the decode bench: one model, caches with the same tokens, one decoded token each in turn."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress.attach import attach, detach
from kvpress.cache import CompressedCache
from kvpress.cache.formats import LayerFormat
from kvpress.errors import KvpressError
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.layer_projection import LayerProjection

FLOOR_TOKENS = 16
WARMUP_ROUNDS = 2
#: allowed |full - transformers| / |transformers| of a step's logits. Half-precision logits of deep models differ by more
#: than this between any two attention implementations; then NOISE_FACTOR times the difference between transformers' own
#: eager and configured attention is allowed.
LOGIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NOISE_FACTOR = 2.0


@dataclass
class Arm:
    """One cache that decodes, with its seconds per token and the logits of its latest step."""

    cache: Any
    ours: bool = False
    seconds: list[float] = field(default_factory=list)
    logits: Tensor | None = None

    def step(self, model: PreTrainedModel, token: Tensor) -> float:
        """Decode one token [1, 1] the way generate does; the seconds it took."""
        position = torch.full((1, 1), self.cache.get_seq_length(), device=token.device)
        if self.ours:  # attached for this step only: the other arms run the model as transformers made it
            attach(model)
        try:
            _synchronize(model)
            start = time.perf_counter()
            output = model(
                input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            _synchronize(model)
            spent = time.perf_counter() - start
        finally:
            if self.ours:
                detach(model)
        self.logits = output.logits
        return spent


class Recorder(CompressedCache):
    """A compressed cache that keeps what the model gave each layer, so that one prefill fills the other arms too."""

    def __init__(self, model: PreTrainedModel, contract: str, budget: float) -> None:
        super().__init__(model, contract, budget=budget)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.given[layer_idx] = (key_states, value_states)
        seen: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return seen


def prefill(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> dict[str, float]:
    """Read the prompt as generate does; seconds of the cache's report."""
    cache.begin_prompt(ids.shape[1])
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.close()
    seconds: dict[str, float] = cache.report().to_dict()["seconds"]
    return seconds


def make_arms(model: PreTrainedModel, quarter: Recorder, ids: Tensor) -> dict[str, Arm]:
    """The arms at the same context, all but the quarter filled from what the quarter's prefill recorded."""
    transformers, floor = (DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in range(2))
    model(input_ids=ids[:, :FLOOR_TOKENS], past_key_values=floor, use_cache=True, logits_to_keep=1)
    for index, (keys, values) in sorted(quarter.given.items()):
        transformers.update(keys, values, index)
    n_layers = len(quarter.compressed_layers)
    formats = {
        "full": [LayerFormat()] * n_layers,
        "half_rank": _half_rank(quarter),
        "int8": [LayerFormat(dtype=torch.int8)] * n_layers,
    }
    filled = {name: Arm(_filled(model, quarter, form), ours=True) for name, form in formats.items()}
    quarter.given.clear()
    return {"transformers": Arm(transformers), **filled, "quarter": Arm(quarter, ours=True), "floor": Arm(floor)}


def _filled(model: PreTrainedModel, quarter: Recorder, formats: Sequence[LayerFormat]) -> CompressedCache:
    """A cache that keeps every token that the quarter was given, stored in these formats."""
    cache = CompressedCache(model, "full")
    cache.plan.formats = formats
    cache.begin_prompt(quarter.get_seq_length())
    compressed = {layer.index: layer for layer in cache.compressed_layers}
    for index, (keys, values) in sorted(quarter.given.items()):
        cache.update(keys, values, index)
        if index in compressed:  # what the attention function does once it has attended to the prompt
            compressed[index]._pending = None
            cache.prompt_read(compressed[index])
    cache.close()
    return cache


def _half_rank(quarter: Recorder) -> list[LayerFormat]:
    """Half of the dimensions of a basis that knows nothing: as fast as any other, whatever the model."""
    layers = [layer.index for layer in quarter.compressed_layers]
    shapes = [(k.shape[1], k.shape[-1], v.shape[-1]) for k, v in (quarter.given[index] for index in layers)]

    def eyes(side: int) -> tuple[Tensor, ...]:
        return tuple(torch.eye(shape[side]).expand(shape[0], -1, -1) for shape in shapes)

    bases = Bases(tuple(layers), eyes(1), eyes(2))
    ranks = Ranks(*(tuple((shape[side] // 2,) * shape[0] for shape in shapes) for side in (1, 2)))
    return [LayerFormat(LayerProjection.of(bases, ranks, place)) for place in range(len(layers))]


def race(model: PreTrainedModel, arms: dict[str, Arm], ids: Tensor, done: Callable[[], None]) -> dict[str, float]:
    """Let all arms decode the same tokens [1, rounds] in turn, calling `done` after each round.

    Returns the largest error of the full cache's logits against transformers', and what was allowed. Raises KvpressError
    at the first round whose error is larger.
    """
    tolerance = max(LOGIT_TOLERANCE[model.dtype], NOISE_FACTOR * _noise(model, arms["transformers"], ids[:, :1]))
    worst = 0.0
    for at in range(ids.shape[1]):
        for arm in arms.values():
            spent = arm.step(model, ids[:, at : at + 1])
            if at >= WARMUP_ROUNDS:
                arm.seconds.append(spent)
        error = _difference(arms["full"], arms["transformers"])
        if not error <= tolerance:  # also for NaN
            raise KvpressError(
                f"the full cache's logits differ from transformers' by {error:.1e} (allowed in "
                f"{str(model.dtype).removeprefix('torch.')}: {tolerance:.0e}) at step {at}: no time is reported for "
                "wrong results"
            )
        worst = max(worst, error)
        done()
    return {"full_logits_error": worst, "tolerance": tolerance}


def _difference(arm: Arm, other: Arm) -> float:
    assert arm.logits is not None
    assert other.logits is not None
    return float((arm.logits.double() - other.logits.double()).norm() / other.logits.double().norm())


def _noise(model: PreTrainedModel, arm: Arm, token: Tensor) -> float:
    """How much one step's logits differ between transformers' eager attention and the one the model is set to."""
    plain, eager = Arm(copy.deepcopy(arm.cache)), Arm(copy.deepcopy(arm.cache))
    plain.step(model, token)
    name = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        eager.step(model, token)
    finally:
        model.set_attn_implementation(name)
    return _difference(eager, plain)


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
