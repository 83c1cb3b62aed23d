"""The compile-only gate: every shipped configuration compiles well, and the gate sees what it is there to see.

Run as a script, this file compiles its own bad kernels and prints the rows; pytest's process has the interpreter on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from kvpress_kernels import compiled, launch, load_widths, ops
from kvpress_kernels.compile_report import is_main, main, markdown, table
from kvpress_kernels.pages import PageLayout, Pages

ROOT = Path(__file__).parents[2]
ARCHITECTURES = list(compiled.DEVICES)
KEYS = [
    "kernel", "config", "arch", "registers", "spills", "shared_bytes", "ctas_per_sm", "kv_buffers", "load_bytes", "problems",
]  # fmt: skip


@triton.jit
def _decode(
    ANCHOR, PAGE_TABLE, LENGTHS, OUT,
    D: tl.constexpr, PAGE: tl.constexpr, STAGES: tl.constexpr, CARRIED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Decode attention in small: pages of one row, one group of 16 query heads of ones."""
    n_tokens = tl.load(LENGTHS)
    last = tl.cdiv(n_tokens, PAGE)
    slot, column = tl.arange(0, PAGE), tl.arange(0, D)
    query = tl.full([16, D], 1.0, ANCHOR.dtype.element_ty)
    accumulator = tl.zeros([16, D], tl.float32)
    next_entry = tl.load(PAGE_TABLE, mask=last > 0, other=0)
    for p in tl.range(0, last, 1, num_stages=STAGES):
        if CARRIED:
            page = ANCHOR + next_entry * UNIT
            next_entry = tl.load(PAGE_TABLE + p + 1, mask=p + 1 < last, other=0)
        else:
            page = ANCHOR + tl.load(PAGE_TABLE + p) * UNIT
        held = p * PAGE + slot < n_tokens
        keys = tl.load(page + slot[None, :] * D + column[:, None], mask=held[None, :], other=0.0)
        values = tl.load(page + PAGE * D + slot[:, None] * D + column[None, :], mask=held[:, None], other=0.0)
        weights = tl.exp2(tl.dot(query, keys, input_precision="ieee"))
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    tl.store(OUT + tl.arange(0, 16)[:, None] * D + column[None, :], accumulator)


TYPES = {"ANCHOR": "*bf16", "PAGE_TABLE": "*i64", "LENGTHS": "*i32", "OUT": "*fp32"}
GOOD = {"D": 128, "PAGE": 32, "STAGES": 4, "CARRIED": True, "UNIT": 8}
#: what is wrong -> (changed constants, warps, architecture, words of the sentence that says so)
BAD = {
    "one buffer": ({"STAGES": 2}, 4, "sm_90", "1 K/V buffer"),
    "table in loop": ({"CARRIED": False}, 4, "sm_90", "1 K/V buffer"),
    "narrow loads": ({"UNIT": 1}, 4, "sm_80", "2 bytes at a time"),
    "narrow loads on AMD": ({"UNIT": 1}, 4, "gfx942", "2 bytes at a time"),
    "spills": ({"D": 256, "PAGE": 64, "STAGES": 3}, 1, "sm_80", "spills"),
    "spills on AMD": ({"D": 256, "PAGE": 64, "STAGES": 3}, 1, "gfx942", "spills"),
    "shared memory": ({"PAGE": 128, "STAGES": 5}, 8, "sm_80", "bytes of shared memory"),
    "does not compile": ({"PAGE": 33}, 4, "sm_80", "does not compile"),
}


def case(config, constants=None, num_warps=4, types=None):
    constants = GOOD | (constants or {})
    return launch.CompileCase(
        "test", config, _decode, types or TYPES, constants, num_warps, constants["STAGES"], kv_loop=True
    )


def compile_own_kernels():
    rows = {f"good {arch}": compiled.measure(case("good"), arch) for arch in ARCHITECTURES}
    rows |= {
        name: compiled.measure(case(name, changed, warps), arch) for name, (changed, warps, arch, _) in BAD.items()
    }
    no_out = {name: kind for name, kind in TYPES.items() if name != "OUT"}
    rows["forgotten argument"] = compiled.measure(case("forgotten", types=no_out), "sm_80")
    kernel = compiled.compile_case(case("good"), "sm_90")
    tools = Path(compiled.nvidia_tool("nvdisasm"))
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "good.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    sass = subprocess.run([tools, "-c", cubin], capture_output=True, text=True, check=True).stdout
    copies = sum("LDGSTS" in line for line in sass.splitlines())
    wide = sum("LDGSTS" in line and ".128" in line for line in sass.splitlines())
    return {"rows": rows, "sass": [copies, wide], "ptx": kernel.asm["ptx"].count("cp.async.cg.shared.global")}


def compiling(*arguments, folder):
    """Run Python without the interpreter of kernels, and with a Triton cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment)


# One test for all shipped kernels and one for our own: the workers of a parallel run would each compile them again.


@pytest.mark.slow
def test_shipped_configurations_compile_well(tmp_path):
    """All of them on sm_90, the main ones on the others: all on all takes four minutes of two cores more (`compile_report` does it)."""
    rows = []
    for arguments in (["--arch", "sm_90"], ["--main", "--arch", "sm_80", "gfx942"]):
        done = compiling("-m", "kvpress_kernels.compile_report", "--json", *arguments, folder=tmp_path)
        assert done.returncode in (0, 1), done.stderr[-3000:]
        rows += json.loads(done.stdout)
    problems = [
        f"{row['kernel']} [{row['config']}] on {row['arch']}: {sentence}"
        for row in rows
        for sentence in row["problems"]
    ]
    assert not problems, "\n" + "\n".join(problems)
    assert all(list(row) == KEYS for row in rows)
    with_kernel = [op for op in ops.OPS if op not in ops.WITHOUT_KERNEL]
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (op, arch) for op in with_kernel for arch in ARCHITECTURES
    }
    labels = [(row["kernel"], row["config"], row["arch"]) for row in rows]
    assert len(set(labels)) == len(labels), "two configurations of an op have the same label"
    docs = (ROOT / "docs" / "kernels.md").read_text()
    if f"triton {triton.__version__};" in docs:
        shown = [row for row in rows if row["arch"] == "sm_90" and is_main(row["config"])]
        assert markdown(shown) in docs, "the table of docs/kernels.md is out of date: it says how it is made"


@pytest.mark.slow
def test_bad_kernels_are_caught_and_good_ones_are_not(tmp_path):
    done = compiling(__file__, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    own = json.loads(done.stdout.splitlines()[-1])
    rows = own["rows"]
    for name, (*_, words) in BAD.items():
        assert any(words in sentence for sentence in rows[name]["problems"]), (name, rows[name])
    (sentence,) = rows["forgotten argument"]["problems"]
    assert "OUT" in sentence
    for arch in ARCHITECTURES:
        row = rows[f"good {arch}"]
        assert row["problems"] == []
        assert (row["load_bytes"], row["spills"]) == (16, 0)
    assert rows["good sm_90"]["kv_buffers"] == rows["good sm_80"]["kv_buffers"] == 3
    assert rows["good sm_90"]["ctas_per_sm"] == 4
    assert rows["good sm_80"]["ctas_per_sm"] == 3
    # the text that the widths are read from says what the machine code does
    copies, wide = own["sass"]
    assert copies == wide == own["ptx"] > 0


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "expected"),
    [
        ("sm_90", 72, 54272, 4, 4),  # 228 KB / (53 + 1) KB
        ("sm_80", 72, 54272, 4, 3),  # 164 KB / (53 + 1) KB
        ("sm_90", 128, 0, 4, 4),  # 65,536 registers / (128 x 128)
        ("sm_90", 129, 0, 4, 3),  # rounded up to 136: 3 warps a quarter
        ("sm_90", 16, 0, 1, 32),  # blocks
        ("sm_90", 32, 0, 4, 16),  # warps
        ("sm_80", 255, 0, 16, 0),  # 8 warps fit, 16 are needed
        ("gfx942", 156, 16384, 4, 3),  # 512 / 160 waves a quarter
        ("gfx942", 64, 32768, 4, 2),  # 64 KB / 32 KB
    ],
)
def test_programs_per_processor(arch, registers, shared, num_warps, expected):
    assert compiled.ctas_per_sm(arch, registers, shared, num_warps) == expected


PTX = """
.loc	1 16 11
@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
.loc	1 17 11, function_name $L__info_string0, inlined_at 1 30 5
@%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4, %r5;
.loc	1 18 11
ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
.loc	2 16 11
ld.global.b64 { %rd3 }, [ %rd1 + 0 ];
.file	1 "/folder/decode.py"
.file	2 "/folder/standard.py"
"""
AMD = """
.file	1 "/folder" "decode.py"
.loc	1 16 11 is_stmt 0
global_load_dwordx4 v[0:3], v[1:2], off
.loc	1 17 11
buffer_load_dword v1, v2, s[0:3], 0 offen
global_load_short_d16_hi v2, v[1:2], off
ds_read_b128 v[0:3], v1
"""
TTGIR = """
#loc = loc("/elsewhere/decode.py":3:0)
#loc1 = loc("/elsewhere/decode.py":16:11)
#loc2 = loc("/elsewhere/decode.py":17:11)
#loc3 = loc("/elsewhere/decode.py":30:5)
tt.func public @decode() {
  %q = tt.load %0 : tensor<16x128x!tt.ptr<bf16>, #blocked> loc(#loc3)
  scf.for %i = %a to %b {
    %k = ttg.async_copy_global_to_local %1, %2 mask %3 : tensor<128x32x!tt.ptr<bf16>, #blocked1> -> <128x32xbf16> loc(#loc5)
    %u = tt.load %4 : tensor<1x32x!tt.ptr<i32>, #blocked> loc(#loc6)
  } loc(#loc)
  %v = tt.load %5 : tensor<16x128x!tt.ptr<bf16>, #blocked> loc(#loc3)
} loc(#loc)
#loc4 = loc(callsite(#loc2 at #loc3))
#loc5 = loc("k"(#loc1))
#loc6 = loc("u"(#loc4))
"""


def test_widths_are_read_from_the_text():
    places = [("decode.py", 16, 11), ("decode.py", 17, 11), ("decode.py", 18, 11), ("standard.py", 16, 11)]
    assert list(load_widths.loads(PTX)) == list(zip(places, [16, 4, 16, 8], strict=True))
    assert list(load_widths.loads(AMD)) == [(places[0], 16), (places[1], 4), (places[1], 2)]
    assert load_widths.most_bytes(PTX) == 16
    assert load_widths.most_bytes("") is None


def test_only_tiles_in_the_loop_count():
    assert list(load_widths.tile_loads(TTGIR)) == [("ttg.async_copy_global_to_local", "#loc5")]
    assert load_widths.tile_bytes(TTGIR, PTX) == load_widths.tile_bytes(TTGIR, AMD) == 16
    wider = TTGIR.replace("tensor<1x32x", "tensor<2x32x")
    assert list(load_widths.tile_loads(wider))[1] == ("tt.load", "#loc6")
    assert load_widths.tile_bytes(wider, PTX) == 4, "through the name, to the callee of an inlined call"
    assert load_widths.tile_bytes("", PTX) is None


def test_pages_are_not_reached_by_32_bit_offsets_on_amd():
    from triton.backends.amd.compiler import HIPBackend

    anchor = Pages(PageLayout(16, 64, 64, torch.bfloat16), "cpu").anchor
    HIPBackend.is_within_2gb(anchor)  # the first question only looks whether torch is there
    assert HIPBackend.is_within_2gb(torch.zeros(16))
    assert not HIPBackend.is_within_2gb(anchor), "a launch on AMD would cut page table entries to 32 bits"


def test_the_documentation_shows_llamas_shape():
    assert is_main("D128 P32 bf16 values")
    assert is_main("attend D128 M64 bf16")
    assert not any(map(is_main, ("D128 P16 bf16", "D64 P32 bf16", "D128 P32 fp32", "D192/128 P32 bf16")))


def test_report_refuses_the_interpreter(capsys):
    assert main(["--op", ops.OPS[0]]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_tables_show_problems_and_gaps():
    row = dict.fromkeys(KEYS) | {"kernel": "decode", "config": "D64", "arch": "sm_90", "problems": ["spills 8 bytes"]}
    assert table([row]).splitlines()[-1].strip() == "! spills 8 bytes"
    assert "-" in table([row]).splitlines()[1]
    assert markdown([row]).splitlines()[-1].startswith("| decode | D64 | sm_90 | - |")


if __name__ == "__main__":
    print(json.dumps(compile_own_kernels()))
