"""Low-rank decode attention next to `ragged_decode` at full rank on the same tokens: half of the numbers, or a quarter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from kvpress_kernels.bench.measurement import Measurement, Prepared
from kvpress_kernels.bench.shapes import Filled, Scale, filled, normal
from kvpress_kernels.check.cases import RELATIVE, difference
from kvpress_kernels.check.lowrank_decode import bases
from kvpress_kernels.launch import n_processors
from kvpress_kernels.pages import PageLayout, Pages, typed


def measurements(scale: Scale, device: torch.device) -> Iterator[Measurement]:
    dim, step = scale.dim, max(8, scale.dim // 4)
    # ranks of keys and values alike, head by head: equal, and as uneven with the same sum
    mixtures = {
        "1/2": [dim // 2],
        "1/4 and 3/4": [step, dim - step],
        "1/4": [step],
    }
    for batch in scale.batches:
        for context in scale.contexts:
            for label, few in mixtures.items():
                ranks = [few[head % len(few)] for head in range(scale.n_kv_heads)]
                n_tokens = context * scale.k_tokens
                setting = {"batch": batch, "tokens": n_tokens, "ranks of full": label}
                prepare = partial(_prepare, scale=scale, batch=batch, n_tokens=n_tokens, ranks=ranks)
                nbytes = decode_bytes(scale, batch, n_tokens, ranks, n_processors(device))
                yield Measurement("lowrank_decode", setting, prepare, nbytes)
            ranks, setting = [dim // 2] * scale.n_kv_heads, {**setting, "ranks of full": "1/2", "stored": "int8"}
            prepare = partial(
                _prepare, scale=scale, batch=batch, n_tokens=n_tokens, ranks=ranks, stored=torch.int8
            )  # fmt: skip
            nbytes = decode_bytes(scale, batch, n_tokens, ranks, n_processors(device), torch.int8)
            yield Measurement("lowrank_decode", setting, prepare, nbytes)


def decode_bytes(
    scale: Scale,
    batch: int,
    n_tokens: int,
    ranks: Sequence[int],
    processors: int,
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that a step reads and writes: reduced K and V, table, bases, queries, partial results twice, results.

    dtype: of what is stored, that of the query by default.
    """
    from kvpress_kernels.decode_launch import n_splits

    item, rows, largest = scale.dtype.itemsize, batch * scale.n_kv_heads, max(ranks)
    used = -(-n_tokens // scale.page_sizes[0])
    parts = 1 if scale.dtype == torch.float32 else 2
    token = sum(PageLayout(scale.page_sizes[0], rank, rank, dtype or scale.dtype).token_bytes - 4 for rank in ranks)
    stored = batch * n_tokens * token + 8 * rows * used
    partials = 2 * 4 * rows * n_splits(rows, used, processors) * scale.group * (largest + 2)
    # query in and out of its projection, result of the reduction in both widths and its lse, output
    ends = rows * scale.group * ((2 * scale.dim + 2 * parts * largest) * item + (4 + 4 + 4) * largest + 4)
    return stored + partials + ends + 4 * 2 * scale.n_kv_heads * scale.dim * largest


def _prepare(
    device: torch.device,
    seed: int,
    *,
    scale: Scale,
    batch: int,
    n_tokens: int,
    ranks: Sequence[int],
    stored: torch.dtype | None = None,
) -> Prepared:
    from kvpress_kernels.lowrank_decode import lowrank_decode
    from kvpress_kernels.ragged_decode import ragged_decode

    heads, page, dim = scale.n_kv_heads, scale.page_sizes[0], scale.dim
    key_bases, value_bases = (bases(device, dim, ranks, seed=2 * seed + i) for i in (0, 1))
    pages: list[Pages] = []
    parts: list[Filled] = []
    for head, rank in enumerate(ranks):
        layout = PageLayout(page, rank, rank, stored or scale.dtype)
        anchor = pages[0].anchor if pages else None
        parts.append(filled(device, layout, [n_tokens] * batch, seed + head, anchor=anchor))
        pages.append(parts[-1].pages)
    query, factor = normal((batch, heads, scale.group, dim), scale.dtype, device, seed), dim**-0.5
    table = torch.stack([part.page_table for part in parts], 1).flatten(0, 1).contiguous()
    lengths = torch.full((batch * heads,), n_tokens, dtype=torch.int32, device=device)
    pairs = torch.tensor([(rank, rank) for rank in ranks], dtype=torch.int32, device=device)

    def launch() -> torch.Tensor:
        return lowrank_decode(query, pages, table, lengths, pairs, key_bases, value_bases, scale=factor)

    if stored is not None:  # codes are not made from numbers here, so there is nothing to compare with
        return Prepared(launch)
    # the same tokens at full rank: what lies in the space of the bases is there again after the rounding
    full = filled(device, scale.layout(), [n_tokens] * batch * heads, seed)
    views = typed(full.pages.slabs[0], full.pages.layout)
    for head, part in enumerate(parts):
        own = typed(part.pages.slabs[0], part.pages.layout)
        places = full.slots.view(batch, heads, -1)[:, head]
        for into, source, basis in ((views.keys, own.keys, key_bases), (views.values, own.values, value_bases)):
            for row in range(batch):
                narrow = source[part.slots[row]].float()  # [M, P, r]
                into[places[row]] = (narrow @ basis[head, :, : ranks[head]].T).to(into.dtype)

    def at_full_rank() -> torch.Tensor:
        return ragged_decode(query, full.pages, full.page_table, full.lengths, scale=factor).output

    def agree() -> tuple[float, float]:
        # the full keys, the full values and both outputs are each rounded once
        return difference(launch(), at_full_rank()), 4 * RELATIVE[scale.dtype]

    return Prepared(launch, {"ragged_decode, full rank": at_full_rank}, agree)
