"""Re-rotation against rotating the raw key at its new position, in float64."""

from __future__ import annotations

import pytest
import torch
from page_rows import Rows

from kvpress_kernels import rerotate as kernel_module
from kvpress_kernels.pages import PageLayout
from kvpress_kernels.reference.rerotate import rerotate as reference
from kvpress_kernels.rerotate import compile_cases
from kvpress_kernels.rerotate import rerotate as kernel

BOTH = pytest.mark.parametrize("rerotate", [kernel, reference], ids=["kernel", "reference"])
#: error relative to the norm of the keys; the interpreter truncates when it stores bfloat16
TOLERANCE = {torch.float64: 2e-8, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
N_ANGLES = 400


def angles(position: torch.Tensor, half: int) -> torch.Tensor:
    """RoPE angles [m, half] in float64."""
    return position.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)


def rope(raw: torch.Tensor, position: torch.Tensor, half: int) -> torch.Tensor:
    """raw [m, Dk] at positions [m], pair by pair as complex numbers, in float64; dims from 2 half on stay."""
    raw = raw.double()
    turned = torch.complex(raw[:, :half], raw[:, half : 2 * half]) * torch.exp(1j * angles(position, half))
    return torch.cat([turned.real, turned.imag, raw[:, 2 * half :]], dim=1)


def tables(half: int) -> tuple[torch.Tensor, torch.Tensor]:
    every = angles(torch.arange(N_ANGLES), half)
    return every.cos().float(), every.sin().float()


def case(lengths: list[int], layout: PageLayout, half: int, seed: int = 0):
    """Rows whose keys stand at old positions; the raw keys and new positions of each row; shifts, garbage behind."""
    rows = Rows(lengths, layout, seed=seed)
    shifts = torch.full((len(lengths), rows.table.shape[1] * layout.page_size), -(2**31), dtype=torch.int32)
    raws, image = [], rows.image()
    for row, length in enumerate(lengths):
        raw = rows.normal(length, layout.key_dim)
        old = torch.randint(0, N_ANGLES, (length,), generator=rows.draw)
        new = (old * torch.rand(length, generator=rows.draw)).long()
        new[::3] = old[::3]  # some stay
        keys = rope(raw, old, half)
        for slot in range(length):
            rows.token(image, row, slot).key.copy_(keys[slot])
        shifts[row, :length] = (old - new).int()
        raws.append((raw, new))
    for (_, stored), slab in zip(image.slabs, rows.pages.slabs, strict=True):
        slab.copy_(stored.view_as(slab))
    return rows, raws, shifts


def check(rerotate, lengths: list[int], layout: PageLayout, half: int | None = None) -> None:
    half = layout.key_dim // 2 if half is None else half
    rows, raws, shifts = case(lengths, layout, half)
    before = rows.image()
    rerotate(rows.pages, rows.table, rows.lengths, shifts, *tables(half))
    after = rows.image()
    for row, (raw, new) in enumerate(raws):
        if not len(raw):
            continue
        found = torch.stack([rows.token(after, row, slot).key for slot in range(len(raw))]).double()
        wanted = rope(raw, new, half)
        assert (found - wanted).norm() <= TOLERANCE[layout.dtype] * wanted.norm()
        for slot in range(len(raw)):  # tokens that stay, and dims that do not rotate, keep their bits
            start = 0 if shifts[row, slot] == 0 else 2 * half
            old = rows.token(before, row, slot).key
            assert torch.equal(found[slot, start:], old[start:].double())
            old.copy_(rows.token(after, row, slot).key)  # the keys are judged; all else must not have changed
    before.assert_equals_pages()
    assert rows.lengths.tolist() == lengths


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_key_turned_back_is_the_raw_key_at_the_new_position(rerotate, dtype):
    check(rerotate, [0, 1, 15, 16, 17, 40], PageLayout(16, 64, 16, dtype))


@BOTH
@pytest.mark.parametrize(("key_dim", "half"), [(24, 12), (80, 40), (80, 16), (96, 8), (128, 64), (2, 1)])
def test_dims_and_partial_rotary(rerotate, key_dim, half):
    check(rerotate, [5, 33], PageLayout(32, key_dim, 16, torch.float32), half)


def test_the_reference_in_float64():
    check(reference, [0, 17, 5], PageLayout(16, 24, 16, torch.float64))


@BOTH
def test_turning_in_two_steps_is_turning_once(rerotate):
    layout = PageLayout(16, 16, 16, torch.float32)
    once, twice = (Rows([20], layout, seed=3) for _ in range(2))
    shifts = torch.randint(0, 200, (1, once.table.shape[1] * 16), generator=once.draw).int()
    cos, sin = tables(8)
    rerotate(once.pages, once.table, once.lengths, shifts, cos, sin)
    rerotate(twice.pages, twice.table, twice.lengths, shifts // 2, cos, sin)
    rerotate(twice.pages, twice.table, twice.lengths, shifts - shifts // 2, cos, sin)
    for slot in range(20):
        one, two = (rows.token(rows.image(), 0, slot).key for rows in (once, twice))
        torch.testing.assert_close(one, two, rtol=0, atol=2e-6)


@BOTH
def test_codes_are_not_turned(rerotate):
    rows = Rows([3], PageLayout(16, 8, 8, torch.int8))
    table = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="keys in eight bits cannot be turned"):
        rerotate(rows.pages, rows.table, rows.lengths, torch.zeros(1, 32, dtype=torch.int32), table, table)


def test_bad_input():
    rows, _, shifts = case([5, 20], PageLayout(16, 16, 16, torch.float32), 8)
    cos, sin = tables(8)

    def refused(sentence, table=rows.table, lengths=rows.lengths, shifts=shifts, cos=cos, sin=sin):
        with pytest.raises(ValueError, match=sentence):
            kernel(rows.pages, table, lengths, shifts, cos, sin)

    refused("page_table must be", table=rows.table.int())
    refused("lengths must be", lengths=rows.lengths.long())
    refused("shifts must be", shifts=shifts[:, :-1])
    refused("shifts must be", shifts=shifts.long())
    refused("cos and sin must be", cos=cos.double())
    refused("cos and sin must be", sin=sin[1:])
    refused("cos and sin must be", sin=sin[:, :-1])
    refused("have half as many", cos=tables(9)[0], sin=tables(9)[1])
    refused("on one device", shifts=shifts.to("meta"))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_configuration_names_every_argument(arch):
    for item in compile_cases(arch):
        assert sorted([*item.types, *item.constants]) == sorted(kernel_module._rerotate.arg_names)
