"""Attention of one new token per sequence over a ragged KV store, in plain torch.

The decode step on CPUs for good, and the reference of the paged GPU kernel. Two ways to the same numbers:

- all segments equally long and evenly spaced: one strided view `[R, n, D]`, one batched matmul per side;
- ragged: every segment is cut into units of up to 256 tokens, and all units of all segments go through one
  batched matmul (the flat work list of flash-decoding), so no head is padded to the longest one.

The group of query heads that shares a KV head is the matmul's row dimension: keys are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpress_kernels.reference import cpu_route
from kvpress_kernels.reference.packed_units import UNIT_TOKENS, decode_units, finish_logits, softmax_dtype


def packed_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q k^T) v` over each segment; inference only, no gradient.

    query: [B, Hkv, G, D], one token per sequence, G query heads per KV head. keys: [capacity, D], values:
    [capacity, Dv], any float dtype. starts, lengths: B*Hkv host integers in (row, KV head) order; segment r
    holds `keys[starts[r] : starts[r] + lengths[r]]`, nothing outside a segment is read.
    softcap: logits become `softcap * tanh(logits / softcap)` (Gemma-2). sinks: [Hkv*G] learned logits that
    join the softmax denominator only (gpt-oss). key_scales, value_scales: [capacity] factors of the stored vectors, for keys and
    values in int8 (`int8.quantise`); they are multiplied into logits and weights, so codes are only widened.

    Returns [B, Hkv, G, Dv] in the dtype of query; an empty segment gives zeros. The softmax is float32, or
    float64 for a float64 query. Raises ValueError for shapes or segments that do not fit together.
    """
    batch, n_kv, group, head_dim = query.shape
    rows, value_dim = batch * n_kv, values.shape[-1]
    check_segments(n_kv * group, rows, head_dim, keys, values, starts, lengths, sinks)
    work = cpu_route.matmul_dtype(query.dtype, query.device)
    if key_scales is not None and work == torch.float16:
        work = torch.float32  # products with codes are up to 127 times larger than logits, and float16 ends at 65504
    # Detached rather than under no_grad, which costs as much as a matmul of a short cache.
    keys, values = keys.detach(), values.detach()
    q_rgd, rest = _scaled(query.detach().reshape(rows, group, head_dim), work, scale)
    sinks_rg = None
    if sinks is not None:
        sinks_rg = sinks.detach().to(softmax_dtype(work)).view(n_kv, group).repeat(batch, 1)
        sinks_rg = F.pad(sinks_rg, (0, q_rgd.shape[1] - group))
    token_bytes = max(head_dim, value_dim) * work.itemsize
    # A segment that alone overflows the staging buffer goes as units, which are staged group by group.
    if lengths[0] * token_bytes <= cpu_route.STAGE_BYTES and _evenly_spaced(starts, lengths):
        scales = tuple(
            None if s is None else _view(s[:, None], starts, lengths)[..., 0] for s in (key_scales, value_scales)
        )
        out = _decode_uniform(
            q_rgd, _view(keys, starts, lengths), _view(values, starts, lengths), rest, softcap, sinks_rg, scales
        )
    else:
        out = decode_units(q_rgd, keys, values, starts, lengths, rest, softcap, sinks_rg, (key_scales, value_scales))
    return out[:, :group].to(query.dtype).view(batch, n_kv, group, value_dim)


def check_segments(
    n_heads: int,
    rows: int,
    head_dim: int,
    keys: Tensor,
    values: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    sinks: Tensor | None,
) -> None:
    """Raise ValueError, in one sentence, where a store's buffers, segments or sinks do not fit the query."""
    if keys.dim() != 2 or values.dim() != 2 or keys.shape[1] != head_dim:
        raise ValueError(
            f"keys and values must be [capacity, dim] with the query's head_dim {head_dim}, "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if len(starts) != rows or len(lengths) != rows:
        raise ValueError(
            f"expected {rows} segments (rows x KV heads), got {len(starts)} starts and {len(lengths)} lengths"
        )
    capacity = min(keys.shape[0], values.shape[0])
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or length < 0 or start + length > capacity:
            raise ValueError(f"segment [{start}, {start + length}) lies outside the buffer of {capacity} tokens")
    if sinks is not None and sinks.numel() != n_heads:
        raise ValueError(f"sinks must hold {n_heads} logits, one per query head, got {sinks.numel()}")


def _scaled(q_rgd: Tensor, work: torch.dtype, scale: float) -> tuple[Tensor, float]:
    """The query in `work` dtype times as much of `scale` as costs no rounding, and the factor left for the logits.

    In half precision that is the power of two in `scale`: it keeps float16 logits from overflowing and is exact.
    On a CPU in float32, 3 or 7 query heads get a zero row added: MKL's kernel takes rows in fours and is 12 to
    40 % slower with a remainder of three than with one more row.
    """
    if work not in (torch.float32, torch.float64):
        mantissa, exponent = math.frexp(scale)
        return q_rgd.to(work) * 2.0**exponent, mantissa
    rows, group, head_dim = q_rgd.shape
    if group % 4 != 3 or q_rgd.device.type != "cpu":
        return q_rgd.to(work) * scale, 1.0
    padded = torch.zeros((rows, group + 1, head_dim), dtype=work)
    padded[:, :group].copy_(q_rgd)
    return padded.mul_(scale), 1.0


def _evenly_spaced(starts: Sequence[int], lengths: Sequence[int]) -> bool:
    rows = len(starts)
    step = starts[1] - starts[0] if rows > 1 else 1
    if step <= 0 or any(length != lengths[0] for length in lengths):
        return False
    return all(starts[r] == starts[0] + r * step for r in range(2, rows))


def _view(buffer: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Evenly spaced segments of one length as one view [R, n, dim]."""
    token_stride, dim_stride = buffer.stride()
    step = starts[1] - starts[0] if len(starts) > 1 else lengths[0]
    return buffer.as_strided(
        (len(starts), lengths[0], buffer.shape[1]),
        (step * token_stride, token_stride, dim_stride),
        buffer.storage_offset() + starts[0] * token_stride,
    )


def _decode_uniform(
    q_rgd: Tensor,
    k_rnd: Tensor,
    v_rnd: Tensor,
    rest: float,
    softcap: float | None,
    sinks_rg: Tensor | None,
    scales_rn: tuple[Tensor | None, ...],
) -> Tensor:
    """[R, G, Dv] for equally long segments, in tiles of rows whose staged K fits the staging buffer."""
    rows, n_tokens, key_dim = k_rnd.shape
    if n_tokens == 0:
        return q_rgd.new_zeros((rows, q_rgd.shape[1], v_rnd.shape[2]))
    tile = rows
    if k_rnd.dtype != q_rgd.dtype or v_rnd.dtype != q_rgd.dtype or _n_splits(q_rgd, n_tokens) > 1:
        row_bytes = n_tokens * max(key_dim, v_rnd.shape[2]) * q_rgd.dtype.itemsize
        tile = max(1, min(rows, cpu_route.STAGE_BYTES // row_bytes))
    parts = []
    for r in range(0, rows, tile):
        at = slice(r, r + tile)
        sink = None if sinks_rg is None else sinks_rg[at]
        factors = tuple(None if s is None else s[at, None].to(softmax_dtype(q_rgd.dtype)) for s in scales_rn)
        parts.append(_decode_tile(q_rgd[at], k_rnd[at], v_rnd[at], rest, softcap, sink, factors))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _n_splits(q_rgd: Tensor, n_tokens: int) -> int:
    """Parts along the tokens that give every thread a batch item: MKL's batched matmul does not split an item."""
    if q_rgd.device.type != "cpu" or q_rgd.dtype.itemsize < 4:
        return 1
    return max(1, min(-(-torch.get_num_threads() // q_rgd.shape[0]), n_tokens // UNIT_TOKENS))


def _decode_tile(
    q_rgd: Tensor,
    k_rnd: Tensor,
    v_rnd: Tensor,
    rest: float,
    softcap: float | None,
    sinks_rg: Tensor | None,
    factors_r1n: tuple[Tensor | None, ...],
) -> Tensor:
    """[R, G, Dv] for one tile, its tokens cut into `splits` equal chunks of c tokens (zero-filled at the end)."""
    key_factor, value_factor = factors_r1n
    rows, n_tokens, key_dim = k_rnd.shape
    group, value_dim, splits = q_rgd.shape[1], v_rnd.shape[2], _n_splits(q_rgd, n_tokens)
    chunk = -(-n_tokens // splits)
    k_rnd = _staged(k_rnd, q_rgd.dtype, splits, chunk)
    if splits == 1:
        logits = torch.bmm(q_rgd, k_rnd.transpose(1, 2))
    else:
        q_items = q_rgd[:, None].expand(rows, splits, group, key_dim).reshape(rows * splits, group, key_dim)
        items = torch.bmm(q_items, k_rnd.view(rows * splits, chunk, key_dim).transpose(1, 2))
        logits = items.view(rows, splits, group, chunk).transpose(1, 2).reshape(rows, group, splits * chunk)
    if key_factor is not None:
        logits = logits.to(key_factor.dtype)
        logits[:, :, :n_tokens].mul_(key_factor)
    logits = finish_logits(logits, rest, softcap)
    if splits * chunk > n_tokens:
        logits[:, :, n_tokens:] = -math.inf
    if sinks_rg is None:
        probs = torch.softmax(logits, dim=-1)
    else:
        probs = torch.softmax(torch.cat((logits, sinks_rg[:, :, None]), dim=-1), dim=-1)[:, :, :-1]
    if value_factor is not None:
        probs[:, :, :n_tokens] *= value_factor
    probs = probs.to(q_rgd.dtype)
    v_rnd = _staged(v_rnd, q_rgd.dtype, splits, chunk)
    if splits == 1:
        return torch.bmm(probs, v_rnd)
    p_items = probs.reshape(rows, group, splits, chunk).transpose(1, 2).reshape(rows * splits, group, chunk)
    out = torch.bmm(p_items, v_rnd.view(rows * splits, chunk, value_dim))
    return out.view(rows, splits, group, value_dim).sum(dim=1)


def _staged(x_rnd: Tensor, work: torch.dtype, splits: int, chunk: int) -> Tensor:
    """x in `work` dtype with `splits * chunk` tokens, zero-filled; x itself where a matmul can read it as it is."""
    rows, n_tokens, dim = x_rnd.shape
    if x_rnd.dtype == work and (splits == 1 or (splits * chunk == n_tokens and x_rnd.is_contiguous())):
        return x_rnd
    buffer = cpu_route.stage((rows, splits * chunk, dim), work, x_rnd.device)
    if splits * chunk == n_tokens:
        return buffer.copy_(x_rnd)
    buffer[:, :n_tokens].copy_(x_rnd)
    buffer[:, n_tokens:].zero_()
    return buffer
