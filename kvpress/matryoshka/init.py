"""Where bases come from before any training: the moments of a text, or no data at all.

pca       eigenvectors of the keys' and the values' covariance (arXiv 2410.14731, section 3: the published start)
query     keys: eigenvectors of keys and queries together, both at equal weight (the joint basis of Eigen Attention);
          values: eigenvectors of the attention output's covariance
planes    keys: rotary planes in the order of E|q|^2 E|k|^2, which commute with the rotation; values as in `query`
dct       the discrete cosine transform: the control that knows nothing
random    orthogonal matrices drawn with a seed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpress.errors import InputError, unknown
from kvpress.matryoshka.bases import Bases
from kvpress.matryoshka.statistics import LayerMoments, Moments


def initial_bases(
    kind: str, layers: Sequence[int], moments: Sequence[LayerMoments], seed: int = 0, means: bool = True
) -> Bases:
    """Bases of a kind for layers with these moments, in float32 on the CPU.

    means: with the value means. Without them a mean is one more direction of the values, so second moments take the covariance's place.

    Raises:
        InputError: an unknown kind, or moments that are no numbers.
    """
    if kind not in KINDS:
        raise InputError(unknown("start of a projection", kind, KINDS))
    for index, one in zip(layers, moments, strict=True):
        if not all(bool(torch.isfinite(m.second).all()) for m in (one.keys, one.values, one.queries, one.outputs)):
            raise InputError(f"layer {index} gave numbers that are not finite: check the model's weights and dtype")
    generator = torch.Generator().manual_seed(seed)
    pairs = [KINDS[kind](one if means else _with_mean(one), generator) for one in moments]
    return Bases(
        tuple(layers),
        tuple(_plain(keys) for keys, _ in pairs),
        tuple(_plain(values) for _, values in pairs),
        tuple(_plain(one.values.mean) for one in moments) if means else None,
    )


def _with_mean(moments: LayerMoments) -> LayerMoments:
    """The moments with those of values and outputs taken about zero."""

    def about_zero(one: Moments) -> Moments:
        return Moments(one.n, torch.zeros_like(one.first), one.second)

    return replace(moments, values=about_zero(moments.values), outputs=about_zero(moments.outputs))


def pca(moments: LayerMoments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the covariance of keys and of values, the largest first."""
    return eigenvectors(moments.keys.covariance), eigenvectors(moments.values.covariance)


def query_weighted(moments: LayerMoments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys by what the keys and the queries of the group hold, values by the output of the attention.

    What is lost is q (I - P) k, so a direction must stay if either side is strong in it. The mean of the keys shifts all logits of a
    query alike and does not count; the queries count with their mean. Carrying the principal directions of Sigma_Q^1/2 k back by
    Sigma_Q^1/2 (arXiv 2604.11501, theorem 1) is optimal where q and k have a basis each; with one orthogonal basis for both its error
    is larger below three fifths of the rank (docs/matryoshka.md).
    """
    together = _unit_trace(moments.keys.covariance) + _unit_trace(moments.queries.uncentred)
    return eigenvectors(together), eigenvectors(moments.outputs.covariance)


def planes(moments: LayerMoments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys by rotary planes (i, i + D/2): a permutation, so that it commutes with the rotation."""
    queries = moments.queries.uncentred.diagonal(dim1=1, dim2=2)
    keys = moments.keys.uncentred.diagonal(dim1=1, dim2=2)
    half = keys.shape[1] // 2
    energy = (queries[:, :half] + queries[:, half:]) * (keys[:, :half] + keys[:, half:])
    order = energy.argsort(dim=1, descending=True)
    columns = torch.stack([order, order + half], 2).flatten(1)  # both dimensions of a plane side by side
    basis = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)[columns].transpose(1, 2)
    return basis, eigenvectors(moments.outputs.covariance)


def dct(moments: LayerMoments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II, the lowest frequency first."""
    return _dct(moments.keys), _dct(moments.values)


def _dct(moments: object) -> Tensor:
    heads, dim = moments.first.shape  # type: ignore[attr-defined]
    at, frequency = torch.arange(dim, dtype=torch.float64)[:, None], torch.arange(dim, dtype=torch.float64)[None]
    matrix = torch.cos(math.pi / dim * (at + 0.5) * frequency) * math.sqrt(2 / dim)
    matrix[:, 0] /= math.sqrt(2)
    return matrix.expand(heads, dim, dim).contiguous()


def random(moments: LayerMoments, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthogonal matrices drawn uniformly (Haar)."""
    return _haar(moments.keys.first.shape, generator), _haar(moments.values.first.shape, generator)


def _haar(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    heads, dim = shape
    q, r = torch.linalg.qr(torch.randn(heads, dim, dim, dtype=torch.float64, generator=generator))
    signs: Tensor = r.diagonal(dim1=1, dim2=2).sign()
    return torch.mul(q, signs[:, None, :])


def eigenvectors(matrix: Tensor) -> Tensor:
    """Eigenvectors [H, d, d] of symmetric matrices, as columns, the largest eigenvalue first."""
    found: Tensor = torch.linalg.eigh(matrix).eigenvectors.flip(-1)
    return found


def _unit_trace(matrix: Tensor) -> Tensor:
    trace = matrix.diagonal(dim1=1, dim2=2).sum(-1)
    return matrix / trace.clamp(min=torch.finfo(matrix.dtype).tiny)[:, None, None]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().cpu().contiguous()


#: name -> (moments of a layer, generator) -> bases of the keys [H, D, D] and of the values [H, Dv, Dv]
KINDS: dict[str, Callable[[LayerMoments, torch.Generator], tuple[Tensor, Tensor]]] = {
    "pca": pca,
    "query": query_weighted,
    "planes": planes,
    "dct": dct,
    "random": random,
}
