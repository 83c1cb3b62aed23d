"""Cases of decode attention in a reduced space: ranks that differ between heads, options, dtypes, far pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpress_kernels.check.cases import Case, Results, Trial, stored_half
from kvpress_kernels.check.inputs import Size, normal, stored
from kvpress_kernels.pages import PageLayout, Pages

Ranks = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Reduced:
    """Rows whose heads have ranks of their own. pages: one for each layout, all with one anchor."""

    pages: list[Pages]
    page_table: Tensor  # [B * H, M] int64
    lengths: Tensor  # [B * H] int32
    ranks: Tensor  # [H, 2] int32

    def of_head(self, head: int) -> Pages:
        """The pages in which a head's tokens are."""
        first, (key_rank, value_rank) = self.pages[0].layout, self.ranks[head].tolist()
        wanted = PageLayout(first.page_size, key_rank, value_rank, first.dtype)
        return next(part for part in self.pages if part.layout == wanted)

    def read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n, rK], values [n, rV] and positions [n] of a row."""
        own, n = self.of_head(row % len(self.ranks)), int(self.lengths[row])
        found = own.read(self.page_table[row, : -(-n // own.layout.page_size)])
        keys, values, positions = (part.flatten(0, 1)[:n] for part in found)
        return keys, values, positions


def reduced(
    device: torch.device,
    page_size: int,
    dtype: torch.dtype,
    ranks: Ranks,
    counts: Sequence[int],
    *,
    room: int = 0,
    far: bool = False,
) -> Reduced:
    """Random tokens of the reduced space among NaN, row b * H + h of `counts[b * H + h]` tokens with ranks[h].

    room: pages are named for this many tokens behind each row's length. Entries that no token needs name a page of NaN, of the layout of another head where there is one.
    """
    heads, layouts = len(ranks), [PageLayout(page_size, *pair, dtype) for pair in ranks]
    pages: list[Pages] = []
    columns = max(-(-(max(counts, default=0) + room) // page_size), 1) + 1
    table = torch.empty((len(counts), columns), dtype=torch.int64, device=device)
    poison = []
    for seed, layout in enumerate(dict.fromkeys(layouts)):  # heads of equal ranks share pages
        rows = [row for row in range(len(counts)) if layouts[row % heads] == layout]
        anchor = pages[0].anchor if pages else None
        own = [counts[row] for row in rows]
        # a row more, without tokens: all of its entries name the page of NaN
        held = stored(device, layout, [*own, 0], seed=seed, room=room, far=far, anchor=anchor)
        pages.append(held.pages)
        poison.append(held.page_table[-1, -1:])
        table[rows] = torch.cat([held.page_table[:-1], poison[-1].expand(len(rows), columns)], 1)[:, :columns]
    for row in range(len(counts)):
        needed = -(-(counts[row] + room) // page_size)
        table[row, needed:] = poison[row % len(poison)]
    lengths = torch.tensor(counts, dtype=torch.int32, device=device)
    return Reduced(pages, table, lengths, torch.tensor(ranks, dtype=torch.int32, device=device))


def bases(device: torch.device, dim: int, ranks: Sequence[int], seed: int) -> Tensor:
    """Orthonormal columns [H, D, largest rank] float32 for heads of these ranks, zero from each rank on."""
    found = torch.zeros(len(ranks), dim, max(ranks))
    generator = torch.Generator().manual_seed(seed)
    for head, rank in enumerate(ranks):
        columns = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64))[0]
        found[head, :, :rank] = columns.float()
    return found.to(device)


def mixed_ranks(dim: int, n_kv_heads: int) -> list[tuple[int, int]]:
    """Ranks from 8 to three quarters of `dim`, keys and values apart."""
    steps = [max(8, dim * part // 4 // 8 * 8) for part in (0, 1, 2, 3)]
    return [(steps[head % 4], steps[(3 * head + 1) % 4]) for head in range(n_kv_heads)]


def cases(size: Size) -> Iterator[Case]:
    dim, page, group = size.dims[0], size.page_sizes[0], size.groups[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        make = partial(_trial, size=size, dtype=dtype)
        for other in size.dims:
            label = f"{name} D{other} P{page} G{group}"
            yield Case("lowrank_decode", label, partial(make, dim=other, page=page, group=group))
        for other in size.page_sizes[1:]:
            label = f"{name} D{dim} P{other} G{group}"
            yield Case("lowrank_decode", label, partial(make, dim=dim, page=other, group=group))
        for other in size.groups[1:]:
            label = f"{name} D{dim} P{page} G{other}"
            yield Case("lowrank_decode", label, partial(make, dim=dim, page=page, group=other))
        options: dict[str, dict[str, Any]] = {
            "full rank": {"ranks": [(dim, dim)] * size.n_kv_heads},
            "balanced": {"balanced": True},
            "lost mean": {"lost": True},
            "sinks, softcap": {"sinks": True, "softcap": 5.0},
            "sinks, softcap, lost mean, balanced": {"sinks": True, "softcap": 5.0, "lost": True, "balanced": True},
        }
        if size.name == "full":
            options["8,192 tokens a row"] = {"counts": [8192] * size.n_kv_heads}
            options["pages 2^31 elements apart"] = {"far": True, "ranks": [(dim // 2, dim // 2)] * size.n_kv_heads}
        options["int8"] = {"stored": torch.int8}
        options["int8 sinks, softcap, lost mean, balanced"] = {
            **options["sinks, softcap, lost mean, balanced"],
            "stored": torch.int8,
            "ranks": [(dim // 16 * 16 or 16, 16)] * size.n_kv_heads,
        }
        for label, changes in options.items():
            yield Case("lowrank_decode", f"{name} {label}", partial(make, dim=dim, page=page, group=group, **changes))


def _trial(
    device: torch.device,
    *,
    size: Size,
    dtype: torch.dtype,
    dim: int,
    page: int,
    group: int,
    ranks: Ranks | None = None,
    counts: Sequence[int] | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    lost: bool = False,
    balanced: bool = False,
    far: bool = False,
    stored: torch.dtype | None = None,
) -> Trial:
    from kvpress_kernels import lowrank_decode as kernel
    from kvpress_kernels import work_list
    from kvpress_kernels.reference import lowrank_decode as reference

    heads = size.n_kv_heads
    ranks = mixed_ranks(dim, heads) if ranks is None else ranks
    held = reduced(device, page, stored or dtype, ranks, size.lengths(page) if counts is None else counts, far=far)
    query = normal((held.lengths.numel() // heads, heads, group, dim), dtype, device, seed=1)
    key_bases, value_bases = (bases(device, dim, [pair[i] for pair in ranks], seed=i) for i in (0, 1))
    operands = (held.pages, held.page_table, held.lengths, held.ranks, key_bases, value_bases)
    options: dict[str, Any] = {
        "scale": dim**-0.5,
        "softcap": softcap,
        "sinks": normal((heads * group,), torch.float32, device, seed=2) if sinks else None,
        "lost": normal((heads, dim), torch.float32, device, seed=3) if lost else None,
    }
    work = work_list.work_list(held.lengths, page, held.page_table.shape[1], 2) if balanced else None

    def run() -> Results:
        return {"output": kernel.lowrank_decode(query, *operands, work=work, **options)}

    def expected() -> Results:
        return {"output": reference.lowrank_decode(query.double(), *operands, **options)}

    return Trial(run, expected, {"output": stored_half(dtype)})
