"""The work list of a ragged decode step: segments of any lengths in one batched matmul.

Each segment is cut into units of equal size, so that heads of different lengths share a matmul without being
padded to the longest one; at most one unit per segment is partly filled. The partial results of a segment's
units are joined by their common maximum, as in flash-decoding. Used by `packed_decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_kernels.reference import cpu_route

UNIT_TOKENS = 256


def softmax_dtype(work: torch.dtype) -> torch.dtype:
    return torch.float64 if work == torch.float64 else torch.float32


def finish_logits(logits: Tensor, rest: float, softcap: float | None) -> Tensor:
    logits = logits.to(softmax_dtype(logits.dtype))
    if rest != 1.0:
        logits.mul_(rest)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


class _Units:
    """The work list of a ragged step: each segment cut into units of `size` tokens, in segment order.

    `groups` cut the list where the staging buffer is full: (first unit, one past the last, pieces), a piece
    being (first token in the flat buffer, number of tokens, first unit inside the group).
    """

    def __init__(self, starts: Sequence[int], lengths: Sequence[int], token_bytes: int) -> None:
        self.size = max(1, min(UNIT_TOKENS, max(lengths)))
        self.row_of_unit: list[int] = []
        self.partial: list[tuple[int, int]] = []  # units that are not full, and how many tokens they hold
        self.groups: list[tuple[int, int, list[tuple[int, int, int]]]] = []
        room = max(1, cpu_route.STAGE_BYTES // (token_bytes * self.size))
        begin, pieces = 0, list[tuple[int, int, int]]()
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            done = 0
            while done < length:
                used = len(self.row_of_unit) - begin
                if used == room:
                    self.groups.append((begin, begin + used, pieces))
                    begin, used, pieces = begin + used, 0, []
                n_tokens = min(length - done, (room - used) * self.size)
                pieces.append((start + done, n_tokens, used))
                self.row_of_unit += [row] * -(-n_tokens // self.size)
                done += n_tokens
            if length % self.size:
                self.partial.append((len(self.row_of_unit) - 1, length % self.size))
        if pieces:
            self.groups.append((begin, len(self.row_of_unit), pieces))

    def stage(self, buffer: Tensor, group: tuple[int, int, list[tuple[int, int, int]]], work: torch.dtype) -> Tensor:
        """The group's tokens as [units, size, dim] in `work` dtype; the tail of a segment's last unit is zero."""
        begin, end, pieces = group
        flat = cpu_route.stage(((end - begin) * self.size, buffer.shape[1]), work, buffer.device)
        for token, n_tokens, unit in pieces:
            first = unit * self.size
            flat[first : first + n_tokens].copy_(buffer[token : token + n_tokens])
            tail = -n_tokens % self.size
            if tail:
                flat[first + n_tokens : first + n_tokens + tail].zero_()
        return flat.view(end - begin, self.size, buffer.shape[1])

    def factors(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Factors [units, 1, size] of the stored vectors, from their flat buffer [capacity]; zero where no token is."""
        found = [self.stage(scales[:, None], item, dtype).clone() for item in self.groups]
        return torch.cat(found).transpose(1, 2)


def decode_units(
    q_rgd: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    rest: float,
    softcap: float | None,
    sinks_rg: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """[R, G, Dv] for segments of any lengths: one batched matmul over all units, one softmax per segment.

    scales: factors [capacity] of the stored keys and values.
    """
    key_scales, value_scales = scales
    rows, group, _ = q_rgd.shape
    work, device, wide = q_rgd.dtype, q_rgd.device, softmax_dtype(q_rgd.dtype)
    units = _Units(starts, lengths, max(keys.shape[1], values.shape[1]) * work.itemsize)
    out = torch.zeros((rows, group, values.shape[1]), dtype=wide, device=device)
    if not units.row_of_unit:
        return out
    row_of_unit = torch.tensor(units.row_of_unit, device=device)
    q_units = q_rgd[row_of_unit]
    logits = torch.empty((len(row_of_unit), group, units.size), dtype=work, device=device)
    for item in units.groups:
        k_units = units.stage(keys, item, work)
        torch.bmm(q_units[item[0] : item[1]], k_units.transpose(1, 2), out=logits[item[0] : item[1]])
    if key_scales is not None:
        logits = logits.to(wide) * units.factors(key_scales, wide)
    logits = finish_logits(logits, rest, softcap)
    for unit, n_tokens in units.partial:
        logits[unit, :, n_tokens:] = -math.inf
    # A segment's maximum and sum over all its units; a learned sink is one more logit without a value.
    index = row_of_unit[:, None].expand(-1, group)
    top = torch.full((rows, group), -math.inf, dtype=wide, device=device) if sinks_rg is None else sinks_rg.clone()
    top.scatter_reduce_(0, index, logits.amax(dim=-1), "amax")
    probs = logits.sub_(top[row_of_unit][:, :, None]).exp_()
    total = torch.zeros_like(top) if sinks_rg is None else torch.exp(sinks_rg - top)
    total.index_add_(0, row_of_unit, probs.sum(dim=-1))
    if value_scales is not None:
        probs = probs * units.factors(value_scales, wide)
    probs = probs.to(work)
    for item in units.groups:
        v_units = units.stage(values, item, work)
        out.index_add_(0, row_of_unit[item[0] : item[1]], torch.bmm(probs[item[0] : item[1]], v_units).to(wide))
    if 0 in lengths:
        total.masked_fill_(total == 0, 1.0)  # an empty segment without a sink: 0 / 1
    return out.div_(total[:, :, None])
