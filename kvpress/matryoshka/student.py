"""The model with its attention in the reduced space, over whole windows: what training differentiates and what measures perplexity.

    q' = q U_r,  k' = k U_r,  v' = v W_r          attention over these, with the model's own scale and mask
    o  = o' W_r^T + (I - W_r W_r^T) mean

Ranks are masks over columns here, so that one pass may give every head another rank; the cache stores slices instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.errors import InputError
from kvpress.evidence import LayerSpec
from kvpress.matryoshka.bases import Bases, Ranks
from kvpress.matryoshka.passing import Attend, attached, read_window

#: with a sink the weights of the values add up to less than one, so a constant cannot give back what the means lose
MEANS_AND_SINKS = "this model's attention has learned sinks, with which value means cannot be used: train the projection without means"


def reduced_attention(bases: Bases, ranks: Ranks) -> Attend:
    """The attention of a student whose layer `place` projects with bases.keys[place] and bases.values[place]."""

    def attend(place: int, query: Tensor, keys: Tensor, values: Tensor, own: Any, spec: LayerSpec) -> Tensor:
        if spec.sinks is not None and bases.means is not None:
            raise InputError(MEANS_AND_SINKS)
        key_basis = _first_columns(bases.keys[place], ranks.keys[place]).to(keys.dtype)  # [H, D, D]
        value_basis = _first_columns(bases.values[place], ranks.values[place]).to(values.dtype)
        grouped = query.unflatten(1, (-1, spec.group))  # [B, H, G, q, D]
        projected = (grouped @ key_basis[:, None]).flatten(1, 2)
        output: Tensor = own(projected, keys @ key_basis, values @ value_basis)  # [B, q, Hq, Dv]
        output = output.unflatten(2, (-1, spec.group))  # [B, q, H, G, Dv]
        back = torch.einsum("bqhgr,hdr->bqhgd", output, value_basis)
        if bases.means is not None:
            mean = bases.means[place].to(values.dtype)
            back = back + lost_mean(value_basis, mean)[:, None]
        return back.flatten(2, 3)

    return attend


def lost_mean(value_basis: Tensor, mean: Tensor) -> Tensor:
    """(I - W_r W_r^T) mean [H, Dv], for a basis [H, Dv, r] (columns that are zero count as left out)."""
    inside = torch.einsum("hdr,hd->hr", value_basis, mean)
    return mean - torch.einsum("hdr,hr->hd", value_basis, inside)


def _first_columns(basis: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The basis [H, d, d] with columns from each head's rank on set to zero."""
    limit = torch.tensor(ranks, device=basis.device)
    kept = torch.arange(basis.shape[-1], device=basis.device) < limit[:, None]  # [H, d]
    return basis * kept[:, None, :]


@contextmanager
def attached_student(model: PreTrainedModel) -> Iterator[Any]:
    """Attach to a model; gives the function (ids [B, n], bases, ranks) -> logits [B, n, vocabulary]."""

    def read(ids: Tensor, bases: Bases, ranks: Ranks, **kwargs: Any) -> Tensor:
        return read_window(model, ids, reduced_attention(bases, ranks), **kwargs)

    with attached(model):
        yield read
