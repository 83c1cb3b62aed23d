"""How the layers of one model store a token under a contract: the slot `representation`, made concrete for a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

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
    """How one layer stores tokens. projection: None for all dimensions; int8: eight bits and a float16 scale for each vector."""

    projection: LayerProjection | None = None
    int8: bool = False

    def ranks(self, dims: tuple[int, int], n_heads: int) -> list[tuple[int, int]]:
        """(rK, rV) of each KV head. dims, n_heads: (D, Dv) and KV heads where nothing is projected."""
        return [dims] * n_heads if self.projection is None else self.projection.ranks

    def token_bytes(self, ranks: tuple[int, int], itemsize: int) -> int:
        """Bytes of a stored token in a head with these ranks, its position included. itemsize: of the model's dtype."""
        numbers = sum(ranks) + 2 * SCALE_DTYPE.itemsize if self.int8 else sum(ranks) * itemsize
        return numbers + POSITION_BYTES


#: formats of a model by (representation, layers): a cache is made for every prompt
_known: WeakKeyDictionary[PreTrainedModel, dict[str, list[LayerFormat]]] = WeakKeyDictionary()


def layer_formats(representation: Representation, model: PreTrainedModel, n_layers: int) -> list[LayerFormat]:
    """The format of every compressed layer.

    Raises:
        InputError: the projection cannot be read, or was made for another model.
        ContractError: the file is not the one that the contract names by its digest.
    """
    if not isinstance(representation, Orthogonal):
        return [LayerFormat(int8=representation.in_int8)] * n_layers
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
    return [LayerFormat(LayerProjection.of(bases, ranks, place), representation.int8) for place in range(len(layers))]


__all__ = ["POSITION_BYTES", "LayerFormat", "layer_formats"]
