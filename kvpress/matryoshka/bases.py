"""Bases and ranks: an orthogonal matrix for the keys and one for the values of every compressed layer and KV head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpress.errors import InputError

#: ranks are multiples of this: a page of any rank is a whole number of 16-byte units then, and so are loads of 16-bit numbers
RANK_STEP = 8


@dataclass(frozen=True)
class Bases:
    """Columns in order of importance: rank r is the first r of them, so every rank is a prefix of the larger ones.

    layers: [L] indices of the compressed layers among all. keys: L tensors [H, D, D]; values: L tensors [H, Dv, Dv]. means: L tensors
    [H, Dv], value means, or None. What a value loses to the projection is given back as the mean's share in it:
    v -> W_r W_r^T v + (I - W_r W_r^T) mean. A mean of the keys would shift all logits of a query alike and drop out.
    """

    layers: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    means: tuple[Tensor, ...] | None = None

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(KV heads, D, Dv) of each layer."""
        return [(k.shape[0], k.shape[-1], v.shape[-1]) for k, v in zip(self.keys, self.values, strict=True)]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Bases:
        """The bases on another device and in another dtype."""

        def moved(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device, dtype) for tensor in tensors)

        return Bases(self.layers, moved(self.keys), moved(self.values), moved(self.means) if self.means else None)

    def orthogonality_error(self) -> float:
        """Largest |U^T U - I| of all matrices, computed in float64."""
        errors = [orthogonality_error(matrix) for matrix in (*self.keys, *self.values)]
        return float(torch.tensor(errors, dtype=torch.float64).max())  # unlike `max`, NaN wins


def orthogonality_error(matrices: Tensor) -> float:
    """Largest |U^T U - I| of matrices [..., d, d], computed in float64."""
    wide = matrices.detach().double()
    eye = torch.eye(wide.shape[-1], dtype=torch.float64, device=wide.device)
    return float((wide.transpose(-1, -2) @ wide - eye).abs().max())


@dataclass(frozen=True)
class Ranks:
    """Dimensions that are kept: keys[l][h] and values[l][h] for each compressed layer and KV head."""

    keys: tuple[tuple[int, ...], ...]
    values: tuple[tuple[int, ...], ...]

    @classmethod
    def uniform(cls, shapes: Sequence[tuple[int, int, int]], share: float) -> Ranks:
        """The same share of the dimensions everywhere.

        Raises:
            InputError: the share is not in (0, 1], or gives a rank that is no multiple of 8.
        """
        return cls(
            tuple((_share_of(dim, share),) * heads for heads, dim, _ in shapes),
            tuple((_share_of(dim, share),) * heads for heads, _, dim in shapes),
        )

    @classmethod
    def is_uniform(cls, shapes: Sequence[tuple[int, int, int]], share: float) -> bool:
        """Whether `uniform` has ranks for this share."""
        try:
            return bool(cls.uniform(shapes, share))
        except InputError:
            return False

    @classmethod
    def full(cls, shapes: Sequence[tuple[int, int, int]]) -> Ranks:
        """All dimensions."""
        return cls.uniform(shapes, 1.0)

    @property
    def total(self) -> int:
        """Numbers stored for one token in all layers and heads, keys and values together."""
        return sum(rank for table in (self.keys, self.values) for layer in table for rank in layer)

    def share(self, shapes: Sequence[tuple[int, int, int]]) -> float:
        """Stored numbers as a share of those of the native cache with the same (grouped) KV heads."""
        return self.total / Ranks.full(shapes).total

    def check(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Raise InputError where the ranks do not fit layers of these shapes."""
        for name, table, at in (("keys", self.keys, 1), ("values", self.values, 2)):
            if [len(layer) for layer in table] != [shape[0] for shape in shapes]:
                raise InputError(f"the ranks of the {name} are not one for each layer and KV head")
            for index, (layer, shape) in enumerate(zip(table, shapes, strict=True)):
                for rank in layer:
                    if rank % RANK_STEP or not 0 < rank <= shape[at]:
                        raise InputError(
                            f"rank {rank} of the {name} in layer {index} is no multiple of {RANK_STEP} from {RANK_STEP} to {shape[at]}"
                        )


def _share_of(dim: int, share: float) -> int:
    rank = round(dim * share)
    if not 0 < share <= 1 or abs(rank - dim * share) > 1e-6 or rank % RANK_STEP:
        near = max(RANK_STEP, round(dim * share / RANK_STEP) * RANK_STEP) / dim
        raise InputError(
            f"{share:.4g} of {dim} dimensions is no rank that is a multiple of {RANK_STEP}: the nearest share is {min(near, 1.0):.4g}"
        )
    return rank
