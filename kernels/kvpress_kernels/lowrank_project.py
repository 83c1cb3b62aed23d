"""Small projections at both ends of a low-rank decode step: queries into the reduced space, outputs back out of it.

Each is a kernel of its own, and not a part of the one over pages: that has several programs a row, and each of them would
read the head's whole basis (48 KB at 128 x 96) and multiply in float32 what one program can do for all. Here a program
makes a block of the results of one row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvpress_kernels.launch import CompileCase

#: query heads that a program serves: the least that `tl.dot` takes
HEADS = 16
BLOCK_IN, BLOCK_OUT = 32, 32
NUM_WARPS = 4


@triton.jit
def _project(
    VECTORS,  # [R, G, IN]
    BASES,  # [H, IN, OUT], or [H, OUT, IN], as the strides say
    LOST,  # [H, OUT], or None
    OUTPUT,  # [R, G, OUT]
    REST,  # [R, G, OUT], or None
    n_kv_heads,
    GROUP: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    IN_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = row % n_kv_heads
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    is_head = head < GROUP
    is_out = out < OUT

    result = tl.zeros([HEADS, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        is_in = inner < IN
        vector_at = (row * GROUP + head)[:, None] * IN + inner[None, :]
        vectors = tl.load(VECTORS + vector_at, mask=is_head[:, None] & is_in[None, :], other=0.0).to(tl.float32)
        basis_at = inner[:, None] * IN_STRIDE + out[None, :] * OUT_STRIDE
        basis = tl.load(BASES + kv_head * (IN * OUT) + basis_at, mask=is_in[:, None] & is_out[None, :], other=0.0)
        result = tl.dot(vectors, basis, result, input_precision="ieee")
    if LOST is not None:
        lost = tl.load(LOST + kv_head * OUT + out, mask=is_out, other=0.0).to(tl.float32)
        result += lost[None, :]
    output_at = (row * GROUP + head)[:, None] * OUT + out[None, :]
    rounded = result.to(OUTPUT.dtype.element_ty)
    is_stored = is_head[:, None] & is_out[None, :]
    tl.store(OUTPUT + output_at, rounded, mask=is_stored)
    if REST is not None:
        rest = (result - rounded.to(tl.float32)).to(REST.dtype.element_ty)
        tl.store(REST + output_at, rest, mask=is_stored)


def project(
    vectors: Tensor,
    bases: Tensor,
    output: Tensor,
    *,
    transposed: bool,
    lost: Tensor | None = None,
    rest: Tensor | None = None,
) -> None:
    """Write `vectors @ bases[h] + lost[h]`, or `vectors @ bases[h]^T + lost[h]`, computed in float32.

    vectors: [R, G, IN], row r of KV head r % H; bases: [H, IN, OUT] float32, or [H, OUT, IN] when transposed; lost:
    [H, OUT]; output: [R, G, OUT]; rest: as output, gets what output rounds off. All contiguous and of shapes that the
    caller has checked.
    """
    rows, group, inner = vectors.shape
    out = output.shape[2]
    if not output.numel():
        return
    grid = (rows, -(-out // BLOCK_OUT), -(-group // HEADS))
    _project[grid](
        vectors,
        bases,
        lost,
        output,
        rest,
        bases.shape[0],
        **_constants(group, inner, out, transposed),
        num_warps=NUM_WARPS,
    )


def _constants(group: int, inner: int, out: int, transposed: bool) -> dict[str, int]:
    return {
        "GROUP": group, "IN": inner, "OUT": out, "IN_STRIDE": 1 if transposed else out,
        "OUT_STRIDE": inner if transposed else 1, "HEADS": HEADS, "BLOCK_IN": BLOCK_IN, "BLOCK_OUT": BLOCK_OUT,
    }  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Both directions of both shapes that the decode kernel is compiled for."""
    shapes = [(128, 96), (64, 64), (64, 8)]
    queries = [_case(dim, rank, "bf16", back=False) for dim, rank in shapes]
    backs = [_case(dim, rank, "bf16", back=True) for dim, rank in shapes]
    return [*queries, *backs, *(_case(128, 96, "fp32", back=back) for back in (False, True))]


def _case(dim: int, rank: int, number: str, *, back: bool) -> CompileCase:
    constants: dict[str, int | None] = {**_constants(4, rank if back else dim, dim if back else rank, back)}
    types = {"VECTORS": "*fp32" if back else f"*{number}", "BASES": "*fp32", "n_kv_heads": "i32"}
    types["OUTPUT"] = f"*{number}"
    for name, kind, given in (("LOST", "*fp32", back), ("REST", f"*{number}", not back and number != "fp32")):
        if given:
            types[name] = kind
        else:
            constants[name] = None
    config = f"{'back' if back else 'query'} D{dim} R{rank} {number}"
    return CompileCase("lowrank_project", config, _project, types, constants, NUM_WARPS, num_stages=3)
