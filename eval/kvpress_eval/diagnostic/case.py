"""One sample under examination: what all of its arms share, and what a cache holds of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.cache import CompressedCache
from kvpress_eval.diagnostic.measure import KeptSets
from kvpress_eval.diagnostic.witness import Notes, Witness
from kvpress_eval.engine import Answer, Read
from kvpress_eval.prompt import Prompt
from kvpress_eval.sample import Sample


@dataclass(frozen=True)
class Case:
    """tail: ids behind a context that was cut. full: the full cache as the prompt left it; logits: [1, vocabulary] behind that. reference: the full cache's
    answer where it is right, else None; whole: whether the witness has read all of it. scores: of every arm, by name."""

    sample: Sample
    prompt: Prompt
    tail: list[int]
    full: CompressedCache
    logits: Tensor
    witness: Witness
    reference: Answer | None
    whole: bool
    scores: dict[str, float]

    @property
    def facts(self) -> tuple[tuple[int, int], ...]:
        """Facts inside the part that is cut."""
        return tuple(fact for fact in self.prompt.facts if fact[1] <= self.witness.n_prompt)

    @property
    def seed(self) -> int:
        """Of everything that is drawn on this sample."""
        return int(self.prompt.sha[:8], 16)


def notes_of(read: Read) -> Notes:
    """What the observer of an arm's cache has noted."""
    notes = read.cache.plan.observer
    assert isinstance(notes, Notes)
    return notes


def kept_sets(cache: CompressedCache, witness: Witness) -> KeptSets:
    """Which tokens of the prompt each head of a cache holds now."""
    found = {}
    for layer in cache.compressed_layers:
        groups = layer.storage.groups(0, witness.n_prompt)
        masks = []
        for group in groups:
            mask = torch.zeros(witness.n_prompt, dtype=torch.bool, device=group.keys.device)
            mask[group.positions] = True
            masks += [mask] * group.keys.shape[0]
        found[layer.index] = torch.stack(masks)
    return found


def holds_exact_values(cache: CompressedCache, witness: Witness) -> bool:
    """Whether what a cache stores of the prompt is what the full cache holds."""
    for layer in cache.compressed_layers:
        exact, head = witness.layers[layer.index], 0
        for group in layer.storage.groups(0, witness.n_prompt):
            for keys, values in zip(group.keys, group.values, strict=True):
                at = group.positions
                if not torch.equal(keys, exact.keys[head, at]) or not torch.equal(values, exact.values[head, at]):
                    return False
                head += 1
    return True
