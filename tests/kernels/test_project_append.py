"""Projecting and appending in one launch: against a product and an append of each head in float64, with all other bytes as they were."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvpress_kernels import project_append as kernel_module
from kvpress_kernels.check.lowrank_decode import Reduced, bases, reduced
from kvpress_kernels.project_append import compile_cases
from kvpress_kernels.project_append import project_append as kernel
from kvpress_kernels.reference.project_append import project_append as reference

BOTH = pytest.mark.parametrize("project_append", [kernel, reference], ids=["kernel", "reference"])
CPU = torch.device("cpu")
RANKS = [(8, 64), (64, 16), (24, 8), (16, 40)]
#: relative error of a stored number; the interpreter truncates when it stores bfloat16
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Rows:
    """What is stored, and bases of its heads."""

    held: Reduced
    key_bases: Tensor
    value_bases: Tensor

    @property
    def operands(self) -> tuple:
        held = self.held
        return held.pages, held.page_table, held.lengths, held.ranks, self.key_bases, self.value_bases


def make(counts, room=40, ranks=RANKS, dim=64, page=16, stored=torch.float32) -> Rows:
    """Rows of `counts` tokens, in pages for `room` more."""
    held = reduced(CPU, page, stored, ranks, counts, room=room)
    return Rows(held, *(bases(CPU, dim, [pair[i] for pair in ranks], seed=i) for i in (0, 1)))


def tokens(rows: Rows, batch: int, n: int, dtype=torch.float32, dim=64, size=1.0) -> tuple[Tensor, Tensor]:
    """As a model makes them: views [B, H, q, D] of [B, q, H, D]."""
    draw = torch.Generator().manual_seed(5)
    made = (size * torch.randn(batch, n, len(rows.held.ranks), dim, generator=draw) for _ in range(2))
    keys, values = (part.to(dtype).transpose(1, 2) for part in made)
    return keys, values


def check(project_append, rows: Rows, keys: Tensor, values: Tensor, columns: Tensor, valid=None) -> None:
    heads, before = len(rows.held.ranks), [rows.held.read(row) for row in range(len(rows.held.lengths))]
    slabs = [slab.clone() for part in rows.held.pages for slab in part.slabs]
    project_append(keys, values, columns, *rows.operands, valid=valid)
    changed = sum(
        int((a != b).sum()) for a, b in zip(slabs, (s for p in rows.held.pages for s in p.slabs), strict=True)
    )
    most = 0
    for row, old in enumerate(before):
        batch, head = divmod(row, heads)
        chosen = torch.ones(len(columns), dtype=torch.bool) if valid is None else valid[batch]
        found, n_new = rows.held.read(row), int(chosen.sum())
        assert len(found[2]) == len(old[2]) + n_new
        most += n_new * rows.held.of_head(head).layout.token_bytes
        assert all(torch.equal(a[: len(b)], b) for a, b in zip(found, old, strict=True))
        assert found[2][len(old[2]) :].tolist() == columns[chosen].tolist()
        for side, (dense, own) in enumerate(((keys, rows.key_bases), (values, rows.value_bases))):
            rank = int(rows.held.ranks[head, side])
            expected = dense[batch, head, chosen].double() @ own[head, :, :rank].double()
            error = found[side][len(old[2]) :].double() - expected
            layout = rows.held.of_head(head).layout
            if layout.is_int8:  # half a scale, what rounding the scale adds, and what a tie may do to a code
                bound = expected.abs().amax(1, keepdim=True) / 127 * 0.51 + expected.abs() * 2**-10 + 4e-6
                assert (error.abs() <= bound).all()
            else:
                assert error.norm() <= ROUNDING[layout.dtype] * expected.norm()
    assert changed <= most, "bytes outside of the new tokens have changed"


@BOTH
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("n_tokens", [1, 3, 17, 33])
def test_ranks_that_differ(project_append, stored, n_tokens):
    rows = make([0, 1, 15, 16, 17, 40, 3, 33], stored=stored)
    dtype = torch.float32 if stored == torch.int8 else stored
    check(project_append, rows, *tokens(rows, 2, n_tokens, dtype), torch.arange(100, 100 + n_tokens))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_half_precision_tokens(project_append, dtype):
    rows = make([0, 1, 15, 16], ranks=[(16, 64), (64, 16), (48, 16), (32, 32)], stored=torch.int8)
    check(project_append, rows, *tokens(rows, 1, 2, dtype), torch.tensor([7, 9], dtype=torch.int32))


@BOTH
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "valid", [[[False], [True]], [[False] * 3, [True] * 3], [[False, False, True], [True, False, True]]]
)
def test_padding_takes_no_slot(project_append, stored, valid):
    rows, mask = make([4, 0, 3, 7, 1, 2, 16, 15], stored=stored), torch.tensor(valid)
    keys, values = tokens(rows, 2, mask.shape[1])
    keys, values = (part.masked_fill(~mask[:, None, :, None], torch.nan) for part in (keys, values))
    check(project_append, rows, keys, values, torch.arange(mask.shape[1]), mask)


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e6])
def test_extreme_tokens_as_codes(project_append, size):
    rows = make([3, 0, 17, 16], stored=torch.int8)
    check(project_append, rows, *tokens(rows, 1, 2, size=size), torch.arange(2))


@pytest.mark.parametrize(
    ("dim", "ranks"), [(80, [(72, 80), (8, 40)]), (48, [(48, 48), (48, 48)]), (128, [(96, 16), (32, 128)])]
)
def test_dimensions(dim, ranks):
    rows = make([5, 16], ranks=ranks, dim=dim)
    check(kernel, rows, *tokens(rows, 1, 2, dim=dim), torch.arange(2))


def test_no_tokens():
    rows = make([4, 0, 1, 2])
    check(kernel, rows, *tokens(rows, 1, 0), torch.arange(0))


def test_bad_input():
    rows = make([1, 1, 1, 1])
    (keys, values), columns = tokens(rows, 1, 2), torch.arange(2)

    def refused(sentence, keys=keys, values=values, columns=columns, valid=None, **changes):
        names = ("pages", "page_table", "lengths", "ranks", "key_bases", "value_bases")
        with pytest.raises(ValueError, match=sentence):
            kernel(keys, values, columns, **{**dict(zip(names, rows.operands, strict=True)), **changes}, valid=valid)

    refused("expected keys", values=values[:, :, :1])
    refused("expected keys", keys=keys[0])
    refused("kernels read", keys=keys.double())
    refused("last dimension of keys", keys=keys.transpose(2, 3).contiguous().transpose(2, 3))
    refused("columns must be", columns=torch.arange(3))
    refused("valid must be", valid=torch.ones(2, 2, dtype=torch.bool))
    refused("at least one layout", pages=[])
    refused("ranks must be", ranks=rows.held.ranks.long())
    refused("key_bases must", key_bases=rows.key_bases.half())
    refused("value_bases must", value_bases=rows.value_bases[:, :32])
    refused("lengths must be", lengths=rows.held.lengths.long())
    refused("page_table has", page_table=rows.held.page_table[:2])
    refused("on one device", columns=torch.arange(2, device="meta"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for case in compile_cases(arch):
        assert sorted([*case.types, *case.constants]) == sorted(kernel_module._project_append.arg_names)
        assert case.aligned <= set(case.types)
