"""Turn stored keys back by a number of positions, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpress_kernels.pages import Pages, n_pages


def rerotate(pages: Pages, page_table: Tensor, lengths: Tensor, shifts: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate each stored key by R(-shift) in place, from its RoPE position p to p - shift.

    page_table: [R, M] int64. lengths: [R] int32. shifts: [R, M * P] int32, how far the token in each slot of a row
    moves, at least 0 and below n; read below the row's length only. cos, sin: [n, D] float32 tables of the angles of
    0 .. n - 1 positions, without any attention scaling. Dimension i < D of a key pairs with dimension i + D (half
    split, as in Llama); dimensions from 2 D on (partial rotary) are left alone, and so are stored positions.

    A rotation by R(-s) takes (x1, x2) to (x1 cos s + x2 sin s, x2 cos s - x1 sin s), arXiv 2104.09864 eq. 34.
    """
    if pages.layout.is_int8:
        raise ValueError("keys in eight bits cannot be turned: each turn would round them again; store them in 16 bits")
    half, size = cos.shape[1], pages.layout.page_size
    wide = torch.float64 if pages.layout.dtype == torch.float64 else torch.float32
    for row, length in enumerate(lengths.tolist()):
        entries = page_table[row, : n_pages(lengths[row], size)]
        keys, values, positions = (part.flatten(0, 1)[:length] for part in pages.read(entries))
        shift = shifts[row, :length].long()
        cosine, sine = cos.to(wide)[shift], sin.to(wide)[shift]  # [length, D]
        first, second = keys[:, :half].to(wide), keys[:, half : 2 * half].to(wide)
        rest = keys[:, 2 * half :].to(wide)
        turned = torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=1)
        slot = torch.arange(length, device=keys.device)
        pages.write(entries[slot // size], slot % size, turned, values, positions)
