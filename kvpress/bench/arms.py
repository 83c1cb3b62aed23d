"""The arms of the decode bench: one model, four caches with the same tokens, one decoded token each in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress.attach import attach, detach
from kvpress.cache import CompressedCache
from kvpress.errors import KvpressError

FLOOR_TOKENS = 16
WARMUP_ROUNDS = 2
#: largest |full - transformers| / |transformers| of a step's logits. The half-precision limits leave room for two
#: attention implementations that round at different places in every layer, not for one wrong token.
LOGIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
    """The four arms at the same context, the full ones filled from what the quarter's prefill recorded."""
    transformers, floor = (DynamicCache(config=model.config.get_text_config(decoder=True)) for _ in range(2))
    model(input_ids=ids[:, :FLOOR_TOKENS], past_key_values=floor, use_cache=True, logits_to_keep=1)
    full = CompressedCache(model, "full")
    full.close()
    full.begin_prompt(quarter.get_seq_length())
    compressed = {layer.index: layer for layer in full.compressed_layers}
    for index, (keys, values) in sorted(quarter.given.items()):
        transformers.update(keys, values, index)
        full.update(keys, values, index)
        if index in compressed:  # what the attention function does once it has attended to the prompt
            compressed[index]._pending = None
            full.prompt_read(compressed[index])
    quarter.given.clear()
    return {
        "transformers": Arm(transformers),
        "full": Arm(full, ours=True),
        "quarter": Arm(quarter, ours=True),
        "floor": Arm(floor),
    }


def race(model: PreTrainedModel, arms: dict[str, Arm], ids: Tensor, done: Callable[[], None]) -> float:
    """Let all arms decode the same tokens in turn; the largest error of the full cache's logits against transformers'."""
    worst = 0.0
    tolerance = LOGIT_TOLERANCE[model.dtype]
    for at in range(ids.shape[1]):
        for arm in arms.values():
            spent = arm.step(model, ids[:, at : at + 1])
            if at >= WARMUP_ROUNDS:
                arm.seconds.append(spent)
        theirs, ours = arms["transformers"].logits, arms["full"].logits
        assert theirs is not None
        assert ours is not None
        error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not error <= tolerance:  # also for NaN
            raise KvpressError(
                f"the full cache's logits differ from transformers' by {error:.1e} (allowed in "
                f"{str(model.dtype).removeprefix('torch.')}: {tolerance:.0e}) at step {at}: no time is reported for wrong results"
            )
        worst = max(worst, error)
        done()
    return worst


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
