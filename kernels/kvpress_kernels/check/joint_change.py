"""Cases of what leaving out a set of pages changes: against the formula, and against really leaving them out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvpress_kernels.check.cases import Case, Results, Trial
from kvpress_kernels.check.inputs import Size, Stored, normal, stored
from kvpress_kernels.check.leave_one_out import CHANGE_ERROR, decoded, widened
from kvpress_kernels.pages import PageLayout

#: error against really leaving pages out, by the dtype in which the mean values of the pages were stored
REMOVAL_ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def cases(size: Size) -> Iterator[Case]:
    page, dim, group = size.page_sizes[0], size.dims[0], size.groups[0]
    for dtype in size.dtypes:
        name = str(dtype).removeprefix("torch.")
        shapes = [(PageLayout(page, other, other, dtype), group) for other in size.dims]
        shapes += [(PageLayout(other, dim, dim, dtype), group) for other in size.page_sizes[1:]]
        shapes += [(PageLayout(page, dim, dim, dtype), other) for other in size.groups[1:]]
        for layout, heads in shapes:
            label = f"{name} D{layout.key_dim} P{layout.page_size} G{heads}"
            yield Case("joint_change", label, partial(_trial, size=size, layout=layout, group=heads))
        layout = PageLayout(page, dim, dim, dtype)
        yield Case("joint_change", f"{name} sinks", partial(_trial, size=size, layout=layout, group=group, sinks=True))
        make = partial(_removal, size=size, layout=layout, group=group)
        yield Case("joint_change", f"{name} pages really left out", make)


def _removed(held: Stored) -> Tensor:
    """[R, M] about half of the pages: few of some rows, most of others, and never all of one."""
    removed = torch.rand(held.rows, held.n_columns, generator=torch.Generator().manual_seed(5)) < 0.3
    removed[:, 0], removed[:, 1::2] = False, True
    return removed.to(held.lengths.device)


def _trial(device: torch.device, *, size: Size, layout: PageLayout, group: int, sinks: bool = False) -> Trial:
    from kvpress_kernels import joint_change as kernel
    from kvpress_kernels.reference import joint_change as reference

    held, arguments = decoded(device, size, layout, group, sinks)
    removed = _removed(held)

    def run() -> Results:
        return {"joint change": kernel.joint_change(**arguments, removed=removed)}

    def expected() -> Results:
        return {"joint change": reference.joint_change(**widened(arguments), removed=removed)}

    return Trial(run, expected, {"joint change": CHANGE_ERROR})


def _removal(device: torch.device, *, size: Size, layout: PageLayout, group: int) -> Trial:
    """The kernels' certificate of a set against attention over the pages that stay, in float64."""
    from kvpress_kernels import joint_change as kernel
    from kvpress_kernels import ragged_decode as decode

    held = stored(device, layout, size.lengths(layout.page_size))
    shape = (held.rows // size.n_kv_heads, size.n_kv_heads, group, layout.key_dim)
    query = normal(shape, layout.dtype, device, seed=1)
    scale, removed = layout.key_dim**-0.5, _removed(held)

    def run() -> Results:
        found = decode.ragged_decode(query, held.pages, held.page_table, held.lengths, scale=scale, statistics="values")
        assert found.page_lse is not None
        assert found.page_values is not None
        change = kernel.joint_change(
            found.page_lse, found.page_values, found.output_wide, found.lse, held.lengths, layout.page_size, removed
        )
        return {"joint change": change}

    def expected() -> Results:
        row, index = held.slots()
        stays = ~removed[row, index // layout.page_size]
        tokens, rows_query = held.read(), query.double().flatten(0, 1)  # [R, G, Dk]
        changes = []
        for r in range(held.rows):
            of_row = row == r
            keys, values = tokens.keys[of_row].double(), tokens.values[of_row].double()
            logits = rows_query[r] @ keys.T * scale
            fewer = logits.masked_fill(~stays[of_row], -torch.inf)
            before, after = (part.softmax(-1).nan_to_num() @ values for part in (logits, fewer))
            changes.append((after - before).norm(dim=-1))
        return {"joint change": torch.stack(changes)}

    return Trial(run, expected, {"joint change": REMOVAL_ERROR[layout.dtype]})
