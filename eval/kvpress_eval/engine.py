"""Answers of one model to one prompt under every arm: one prefill, one eviction an arm, one batch of decode steps.

All arms of a sample have prompts of one length, so they decode as the rows of one batch: a step reads the weights once
for all of them. A row leaves the batch when its answer has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvpress.cache import CompressedCache, FanOut, can_join, join, shares_prefill
from kvpress.run import full_cache_bytes
from kvpress.slots.ranking import Jittered, Random
from kvpress_eval.arms import Arm
from kvpress_eval.decode import Decoded, Stop, decode
from kvpress_eval.prompt import Prompt, end_of_turn
from kvpress_eval.records import Seconds, Stopped
from kvpress_eval.sample import Sample


@dataclass(frozen=True)
class Held:
    """What an arm's cache held; fields as in Record."""

    kept_bytes: int
    full_bytes: int
    kept_share: float
    output_change: float | None


@dataclass(frozen=True)
class Answer:
    """What one arm said and what it cost; fields as in Record. ids: of all new tokens, the one that ended the answer included."""

    text: str
    ids: tuple[int, ...]
    n_new: int
    stopped: Stopped
    held: Held
    decode_rows: int
    seconds: Seconds
    measures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Read:
    """A cache that has read and cut the prompt, with the logits [1, vocabulary] behind it and the seconds that took."""

    arm: Arm
    cache: CompressedCache
    logits: Tensor
    prefill: float


class Engine:
    """Runs prompts under arms. chunk: tokens of one forward pass over the prompt, None for all; batch: whether the arms
    decode together."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arms: Sequence[Arm],
        *,
        backend: str = "auto",
        chunk: int | None = None,
        batch: bool = True,
    ) -> None:
        self.model, self.tokenizer, self.arms = model, tokenizer, list(arms)
        self.backend, self.chunk, self.batch = backend, chunk, batch
        self.eos = _eos_ids(model, tokenizer) | end_of_turn(tokenizer)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], samples: Sequence[Sample], aware: bool) -> list[list[Answer]]:
        """Answers [sample][arm] to prompts that share their context.

        aware: the cache is cut when the whole prompt has been read; otherwise when the context has been read, once for
        all samples, and what follows the context is stored in full.
        """
        if aware:
            return [self._aware(*pair) for pair in zip(prompts, samples, strict=True)]
        return self._agnostic(prompts, samples)

    def _aware(self, prompt: Prompt, sample: Sample) -> list[Answer]:
        reads = self._read(self._tensor(prompt.ids), self._reference([], sample), prompt.sha)
        try:
            return self.examine(reads, self._finish(reads, sample, []), prompt, sample, [])
        finally:
            _close(reads)

    def _agnostic(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[list[Answer]]:
        context = self._tensor(prompts[0].ids[: prompts[0].n_context])
        tails = [list(prompt.ids[prompt.n_context :]) for prompt in prompts]
        reads = self._read(context, self._reference(tails[0], samples[0]), prompts[0].context_sha)
        try:
            return [
                self.examine(reads, self._finish(reads, sample, tail), prompt, sample, tail)
                for prompt, sample, tail in zip(prompts, samples, tails, strict=True)
            ]
        finally:
            _close(reads)

    def examine(
        self, reads: Sequence[Read], answers: list[Answer], prompt: Prompt, sample: Sample, tail: list[int]
    ) -> list[Answer]:
        """What a diagnostic adds to the answers, while every arm's cache is still there as the prompt left it."""
        return answers

    @property
    def shares_contexts(self) -> bool:
        """Whether samples can share a context that was cut once: no arm looks at the answer, or evicts while it is made."""
        contracts = [arm.contract for arm in self.arms if arm.contract is not None]
        return all(can_join(contract) and contract.query_law.origin != "oracle" for contract in contracts)

    # --- the prompt

    def _read(self, ids: Tensor, reference: Tensor, draw: str) -> list[Read]:
        """Read and cut the prompt under every arm; those that can share the forward pass do. draw: what random arms draw
        by, in hex."""
        caches = {arm.name: self._cache(arm, reference, draw) for arm in self.arms}
        shared = [arm for arm in self.arms if arm.contract is not None and shares_prefill(arm.contract)]
        fan = FanOut([caches[arm.name] for arm in shared])
        logits = self._forward(ids, fan)
        reads = {arm.name: Read(arm, caches[arm.name], logits, fan.prefill_seconds) for arm in shared}
        for arm in self.arms:
            if arm.name not in reads:
                cache = caches[arm.name]
                logits = self._forward(ids, cache)
                reads[arm.name] = Read(arm, cache, logits, cache.plan.clock.prefill)
        return [reads[arm.name] for arm in self.arms]

    def _cache(self, arm: Arm, reference: Tensor, draw: str) -> CompressedCache:
        assert arm.contract is not None
        contract = arm.contract
        ranking = contract.ranking
        inner = ranking.of if isinstance(ranking, Jittered) else ranking
        if isinstance(inner, Random):  # else one draw of positions would stand for all samples
            drawn = {"kind": "random", "seed": (inner.seed + int(draw, 16)) % 2**31}
            jittered = isinstance(ranking, Jittered)
            contract = contract.swap(ranking={**ranking.model_dump(), "of": drawn} if jittered else drawn)
        return CompressedCache(
            self.model, contract, tokenizer=self.tokenizer, reference=reference, backend=self.backend
        )

    def _forward(self, ids: Tensor, cache: FanOut | CompressedCache | Cache) -> Tensor:
        """Logits [B, vocabulary] behind the ids [B, n], read in chunks."""
        if isinstance(cache, FanOut | CompressedCache):
            cache.begin_prompt(ids.shape[1])
        for part in ids.split(self.chunk or ids.shape[1], dim=1):
            output = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _reference(self, tail: list[int], sample: Sample) -> Tensor:
        """[1, m] ids of what follows the part that is cut, for an oracle: the rest of the prompt, and a right answer."""
        answer = self.tokenizer(" " + sample.right_answer, add_special_tokens=False)["input_ids"]
        return self._tensor([*tail, *answer])

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    # --- the answer

    def _finish(self, reads: Sequence[Read], sample: Sample, tail: list[int]) -> list[Answer]:
        """Decode every arm, in one batch where that is possible, after `tail` has been read in full."""
        stop = Stop(self.eos, self._newlines() if sample.stop_at_newline else frozenset(), sample.max_new_tokens)
        together = [read for read in reads if self.batch and can_join(read.arm.contract)]  # type: ignore[arg-type]
        groups = [together] if together else []
        groups += [[read] for read in reads if read not in together]
        answers = {}
        for group in groups:
            for read, answer in zip(group, self._decode(group, stop, tail), strict=True):
                answers[read.arm.name] = answer
        return [answers[read.arm.name] for read in reads]

    def _decode(self, group: Sequence[Read], stop: Stop, tail: list[int]) -> list[Answer]:
        held = [_held(read) for read in group]
        logits, asked = torch.cat([read.logits for read in group]), 0.0
        joinable = can_join(group[0].arm.contract)  # type: ignore[arg-type]
        # an arm that goes on evicting decodes with its own cache, which nothing else needs afterwards
        cache = join([read.cache for read in group]) if joinable else group[0].cache
        try:
            if tail:
                start = time.perf_counter()
                logits = self._forward_tail(cache, tail, len(group))
                _wait(self.model)
                asked = time.perf_counter() - start
                if joinable:
                    held = [_with_tail(held[row], cache, read.cache, row) for row, read in enumerate(group)]
            decoded = decode(self.model, cache, logits, stop)
            if not joinable:
                held = [_held(read) for read in group]
        finally:
            if joinable:
                cache.close()
        return [
            Answer(
                text=self._text(one),
                ids=tuple(one.ids),
                n_new=len(one.ids),
                stopped=one.stopped,
                held=what,
                decode_rows=len(group),
                seconds=_seconds(read, asked, one),
            )
            for read, one, what in zip(group, decoded, held, strict=True)
        ]

    def _forward_tail(self, cache: CompressedCache, tail: list[int], n_rows: int) -> Tensor:
        logits: Tensor = self.model(
            input_ids=self._tensor(tail).expand(n_rows, -1), past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        return logits

    def _text(self, decoded: Decoded) -> str:
        return str(self.tokenizer.decode(decoded.answer, skip_special_tokens=True))

    def _newlines(self) -> frozenset[int]:
        """The last token of a newline, which ends LongBench's samsum."""
        return frozenset(self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])

    @torch.inference_mode()
    def repeat_full(self, prompt: Prompt, sample: Sample) -> Answer:
        """The full cache once more, so that only arithmetic differs: transformers' cache, one row, the prompt in halves."""
        cache = DynamicCache(config=self.model.config)
        ids = self._tensor(prompt.ids)
        start = time.perf_counter()
        for part in ids.split(-(-ids.shape[1] // 2), dim=1):
            output = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(self.model)
        prefill = time.perf_counter() - start
        n_bytes = full_cache_bytes(cache)
        stop = Stop(self.eos, self._newlines() if sample.stop_at_newline else frozenset(), sample.max_new_tokens)
        one = decode(self.model, cache, output.logits[:, -1], stop)[0]
        return Answer(
            text=self._text(one),
            ids=tuple(one.ids),
            n_new=len(one.ids),
            stopped=one.stopped,
            held=Held(n_bytes, n_bytes, 1.0, None),
            decode_rows=1,
            seconds=Seconds(prefill=prefill, evidence=0.0, eviction=0.0, decode=one.seconds),
        )


def _held(read: Read) -> Held:
    """What an arm holds, measured from its storages: when the prompt has been read and cut, or, where eviction goes on
    in the answer, at the answer's end."""
    cache, report = read.cache, read.cache.report().to_dict()
    changes = [layer["output_change"] for layer in report["layers"] if layer.get("output_change") is not None]
    return Held(
        # without the free pages of a pool, which the arms share
        kept_bytes=sum(layer.nbytes for layer in cache.compressed_layers) + cache.other_nbytes,
        full_bytes=report["full_bytes"],
        kept_share=report["kept_tokens"] / report["seen_tokens"],
        output_change=sum(changes) / len(changes) if changes else None,
    )


def _with_tail(held: Held, batch: CompressedCache, alone: CompressedCache, row: int) -> Held:
    """What a row of a batch holds when it has stored the rest of the prompt behind what its own cache was cut to."""
    grown = full = kept = seen = 0
    for layer, own in zip(batch.compressed_layers, alone.compressed_layers, strict=True):
        store, mine = layer.storage.store, own.storage.store
        assert store is not None
        assert mine is not None
        grown += store.row_bytes(row) - mine.row_bytes(0)
        full += layer.n_heads * (layer.seen - own.seen) * layer.storage.packing.native_bytes
        kept += sum(store.lengths[row * layer.n_heads : (row + 1) * layer.n_heads])
        seen += layer.n_heads * layer.seen
    return Held(held.kept_bytes + grown, held.full_bytes + full, kept / seen, held.output_change)


def _wait(model: PreTrainedModel) -> None:
    """A GPU finishes what it was given, so that the next look at the clock is right."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _seconds(read: Read, asked: float, decoded: Decoded) -> Seconds:
    clock = read.cache.plan.clock
    return Seconds(
        prefill=read.prefill + asked, evidence=clock.evidence, eviction=clock.eviction, decode=decoded.seconds
    )


def _close(reads: Sequence[Read]) -> None:
    for read in reads:
        read.cache.close()


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All ids that end an answer: those of the generation config (chat models have several), and the tokenizer's."""
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = given if isinstance(given, list) else [given]
    return frozenset(int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None)
