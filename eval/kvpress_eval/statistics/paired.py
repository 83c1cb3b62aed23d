"""Pairs: the same samples under an arm and with the full cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvpress.errors import InputError
from kvpress_eval.records import Record
from kvpress_eval.statistics.strata import Array, Stratum


@dataclass(frozen=True)
class Pairs:
    """Scores of one task, length and mode on the samples that both arms have, ordered by sample id.

    samples, clusters: of each pair. arm, full (n,): scores in [0, 1]. unpaired_full: samples that only the full cache
    has, so the arm's records are missing; unpaired_arm: the other way round. Neither enters any number.
    """

    samples: tuple[str, ...]
    clusters: tuple[str, ...]
    arm: Array
    full: Array
    unpaired_full: int = 0
    unpaired_arm: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def differences(self) -> Stratum:
        """Arm minus full, by cluster."""
        return Stratum.of(self.arm - self.full, self.clusters)

    @property
    def is_binary(self) -> bool:
        """Whether every score is 0 or 1 and every item a cluster of its own: then exact methods apply."""
        scores = np.concatenate([self.arm, self.full])
        return bool(np.isin(scores, (0.0, 1.0)).all()) and len(set(self.clusters)) == len(self)

    @property
    def lost(self) -> int:
        """Items whose score fell; for binary items McNemar's b."""
        return int(np.sum(self.arm < self.full))

    @property
    def gained(self) -> int:
        """Items whose score rose; for binary items McNemar's c."""
        return int(np.sum(self.arm > self.full))


def pair(full: Iterable[Record], arm: Iterable[Record]) -> Pairs:
    """Pair the records of one task, length and mode by sample id.

    Raises:
        InputError: a sample was asked with different prompts, so its records must not be compared.
    """
    first, second = {record.sample: record for record in full}, {record.sample: record for record in arm}
    common = sorted(first.keys() & second.keys())
    for sample in common:
        one, other = first[sample], second[sample]
        if one.prompt_sha != other.prompt_sha:
            raise InputError(
                f"sample '{sample}' of task '{one.task}' was run with two different prompts under '{one.arm}' and "
                f"'{other.arm}': these records are not of one run; run the sweep again into an empty folder"
            )
    return Pairs(
        samples=tuple(common),
        clusters=tuple(first[sample].cluster for sample in common),
        arm=np.array([second[sample].score for sample in common], dtype=np.float64),
        full=np.array([first[sample].score for sample in common], dtype=np.float64),
        unpaired_full=len(first) - len(common),
        unpaired_arm=len(second) - len(common),
    )
