"""How the layers of one model store a token under a contract: the slot `representation`, made concrete for a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvpress.errors import ContractError
from kvpress.matryoshka.checkpoint import check_fits, load_projection
from kvpress.matryoshka.layer_projection import LayerProjection
from kvpress.matryoshka.passing import compressed_shapes
from kvpress.slots.representation import Orthogonal, Representation
from kvpress_kernels.reference.int8 import SCALE_DTYPE

#: bytes of a token's position
POSITION_BYTES = 4


@dataclass(frozen=True, eq=False)
class LayerFormat:
    """How one layer stores tokens. projection: None for all dimensions. dtype: of the stored numbers, None for the model's own; torch.int8
    goes with a float16 scale for each vector."""

    projection: LayerProjection | None = None
    dtype: torch.dtype | None = None

    def ranks(self, dims: tuple[int, int], n_heads: int) -> list[tuple[int, int]]:
        """(rK, rV) of each KV head. dims, n_heads: (D, Dv) and KV heads where nothing is projected."""
        return [dims] * n_heads if self.projection is None else self.projection.ranks

    def token_bytes(self, ranks: tuple[int, int], itemsize: int) -> int:
        """Bytes of a stored token in a head with these ranks, its position included. itemsize: of the model's dtype."""
        scales = 2 * SCALE_DTYPE.itemsize if self.dtype == torch.int8 else 0
        return sum(ranks) * (self.dtype.itemsize if self.dtype else itemsize) + scales + POSITION_BYTES


#: formats of a model by (representation, layers): a cache is made for every prompt
_known: WeakKeyDictionary[PreTrainedModel, dict[str, list[LayerFormat]]] = WeakKeyDictionary()


def layer_formats(representation: Representation, model: PreTrainedModel, n_layers: int) -> list[LayerFormat]:
    """The format of every compressed layer.

    Raises:
        InputError: the projection cannot be read, or was made for another model.
        ContractError: the file is not the one that the contract names by its digest.
    """
    if not isinstance(representation, Orthogonal):
        return [LayerFormat(dtype=_dtype(representation))] * n_layers
    known = _known.setdefault(model, {})
    key = representation.model_dump_json()
    if key not in known:
        known[key] = _projected(representation, model)
    return known[key]


def _projected(representation: Orthogonal, model: PreTrainedModel) -> list[LayerFormat]:
    path = Path(representation.file)
    projection = load_projection(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if representation.sha256 not in ("", digest):
        raise ContractError(
            f"projection '{path}' has changed since the contract was made (sha256 {digest[:12]}..., expected "
            f"{representation.sha256[:12]}...): use the old file, or leave sha256 out"
        )
    layers, shapes = compressed_shapes(model)
    check_fits(projection, model, layers, shapes, str(path))
    ranks = projection.ranks(representation.share, representation.ranks == "searched")
    bases = projection.bases
    dtype = _dtype(representation)
    return [LayerFormat(LayerProjection.of(bases, ranks, place), dtype) for place in range(len(layers))]


def _dtype(representation: Representation) -> torch.dtype | None:
    if representation.in_int8:
        return torch.int8
    name = representation.stored_dtype
    return None if name is None else getattr(torch, name)


__all__ = ["POSITION_BYTES", "LayerFormat", "layer_formats"]
