"""What the compiler made of a kernel, without a device: registers, spills, shared memory, load widths, K/V buffers.

Triton compiles for a named architecture on any machine, and its wheel brings `ptxas` and `cuobjdump`. Each shipped
configuration (`CompileCase`) is compiled with the attributes that the just-in-time path would give its arguments, and
judged by the rules that make it fast: nothing spills, it fits into shared memory, keys and values come in 16-byte
pieces, and on NVIDIA at least two buffers of each, so that the next page loads while one is multiplied. It stands for
a device as far as a compiler can; it measures no time.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpress_kernels.launch import CompileCase
from kvpress_kernels.load_widths import most_bytes, tile_bytes, tile_loads

#: pages lie at any distance from it: the one pointer whose offsets never fit into 32 bits
ANCHOR = "ANCHOR"
#: buffers of K and of V that a loop over pages needs to load ahead
MIN_KV_BUFFERS = 2


@dataclass(frozen=True)
class Device:
    """Limits of one processor (SM, compute unit). registers: per thread lane of one of its four quarters.

    Sources: CUDA programming guide, table of compute capabilities 8.0 and 9.0; the CDNA3 instruction set, 3.6.
    """

    target: GPUTarget
    registers: int
    register_step: int
    warps: int
    shared: int  # bytes for all blocks, the reserve of each included
    shared_per_block: int  # bytes that one block can ask for
    shared_reserved: int  # bytes the driver takes for each block
    blocks: int


DEVICES = {
    "sm_80": Device(GPUTarget("cuda", 80, 32), 512, 8, 64, 164 << 10, 163 << 10, 1 << 10, 32),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 512, 8, 64, 228 << 10, 227 << 10, 1 << 10, 32),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 512, 8, 32, 64 << 10, 64 << 10, 0, 32),
}


class Row(TypedDict):
    """One line of the report; None where it does not apply or the kernel did not compile.

    ctas_per_sm: programs that one processor holds at a time; load_bytes: width of the narrowest load of a tile inside
    the loop, in kernels without such a loop of the loads that move most bytes; problems: one sentence each.
    """

    kernel: str
    config: str
    arch: str
    registers: int | None
    spills: int | None
    shared_bytes: int | None
    ctas_per_sm: int | None
    kv_buffers: int | None
    load_bytes: int | None
    problems: list[str]


def measure(case: CompileCase, arch: str) -> Row:
    """Compile one configuration for one architecture and judge it."""
    row: Row = {
        "kernel": case.op, "config": case.config, "arch": arch, "registers": None, "spills": None,
        "shared_bytes": None, "ctas_per_sm": None, "kv_buffers": None, "load_bytes": None, "problems": [],
    }  # fmt: skip
    try:
        kernel = compile_case(case, arch)
    except Exception as error:  # whatever the compiler says belongs into the report
        row["problems"] = [f"does not compile: {_last_line(error)}"]
        return row
    nvidia = DEVICES[arch].target.backend == "cuda"
    registers, spills = nvidia_resources(kernel.asm["cubin"]) if nvidia else amd_resources(kernel.asm["amdgcn"])
    row["registers"], row["spills"] = registers, spills
    row["shared_bytes"] = kernel.metadata.shared
    row["ctas_per_sm"] = ctas_per_sm(arch, registers, kernel.metadata.shared, case.num_warps)
    text = kernel.asm["ptx" if nvidia else "amdgcn"]
    if case.kv_loop:
        row["load_bytes"] = tile_bytes(kernel.asm["ttgir"], text)
        row["kv_buffers"] = kv_buffers(kernel.asm["ttgir"], nvidia)
    else:
        row["load_bytes"] = most_bytes(text)
    row["problems"] = _problems(case, row, nvidia)
    return row


def compile_case(case: CompileCase, arch: str) -> Any:
    """The compiled kernel, with the attributes that a launch would give its arguments.

    A launch marks addresses and the `aligned` integers as multiples of 16, and on AMD every tensor of less than 2 GiB
    as reachable by 32-bit offsets, save the anchor, whose `ptr_range` says otherwise; parameters under
    `do_not_specialize` get neither.
    """
    function, target = case.kernel, DEVICES[arch].target
    types, constants = _signature(case)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        name = parameter.name
        if name in case.constants or parameter.do_not_specialize:
            continue
        pointer, found = types[name].startswith("*"), []
        if (pointer or name in case.aligned) and not parameter.do_not_specialize_on_alignment:
            found.append(["tt.divisibility", 16])
        if pointer and name != ANCHOR and target.backend == "hip":
            found.append(["tt.pointer_range", 32])
        if found:
            attributes[(index,)] = found
    source = ASTSource(fn=function, signature=types, constexprs=constants, attrs=attributes)
    # fused multiply-add is the default of Triton 3.9 and not of 3.10, which says so in a warning
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def _signature(case: CompileCase) -> tuple[dict[str, str], dict[tuple[int, ...], Any]]:
    names = case.kernel.arg_names
    unknown = (set(case.types) | set(case.constants)) - set(names)
    missing = set(names) - set(case.types) - set(case.constants)
    if unknown or missing:
        raise ValueError(f"case names no such argument: {sorted(unknown)}; case does not name: {sorted(missing)}")
    types = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    return types, {(names.index(name),): value for name, value in case.constants.items()}


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes per thread that spill to the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump did not list the resources: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def nvidia_tool(name: str) -> str:
    """Path of one of the tools that come with Triton: cuobjdump, nvdisasm."""
    from triton.backends import nvidia

    return str(Path(str(nvidia.__file__)).parent / "bin" / name)


def amd_resources(text: str) -> tuple[int, int]:
    """Vector registers per lane and bytes per lane in scratch memory, which is where spills go."""
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    registers, scratch, spilled = (int(re.findall(rf"\.{name}:\s+(\d+)", text)[0]) for name in names)
    return registers, max(scratch, 4 * spilled)


def ctas_per_sm(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Programs that fit on one processor at a time."""
    device = DEVICES[arch]
    per_quarter = device.registers // max(device.register_step, _round_up(registers, device.register_step))
    warps = min(4 * per_quarter, device.warps)
    by_shared = device.shared // (shared + device.shared_reserved) if shared + device.shared_reserved else device.blocks
    return min(warps // num_warps, by_shared, device.blocks)


def kv_buffers(ttgir: str, nvidia: bool) -> int:
    """Buffers of K and of V that are in flight: the fewest of any tile that goes through shared memory.

    A tile loaded into registers inside the loop waits for its bytes: one buffer, on NVIDIA.
    """
    shapes = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<((?:\d+x){3})", ttgir)
    buffers = [int(shape.split("x")[0]) for shape in shapes]
    if nvidia and any(operation == "tt.load" for operation, _ in tile_loads(ttgir)):
        buffers.append(1)
    return min(buffers, default=1 if nvidia else 0)


def _problems(case: CompileCase, row: Row, nvidia: bool) -> list[str]:
    device = DEVICES[row["arch"]]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']} bytes per thread")
    if (row["shared_bytes"] or 0) > device.shared_per_block:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory; {row['arch']} has {device.shared_per_block}")
    elif not row["ctas_per_sm"]:
        found.append("does not fit on a processor even once")
    if case.kv_loop and (row["load_bytes"] or 0) < case.load_bytes:
        found.append(f"keys or values are loaded {row['load_bytes']} bytes at a time, not {case.load_bytes}")
    if case.kv_loop and nvidia and (row["kv_buffers"] or 0) < MIN_KV_BUFFERS:
        found.append(f"{row['kv_buffers']} K/V buffer: nothing loads ahead; {MIN_KV_BUFFERS} are needed")
    return found


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def use_cache(folder: str) -> None:
    """Let Triton cache in a folder; call before the first compilation of the process and its children."""
    os.environ["TRITON_CACHE_DIR"] = folder
    triton.knobs.cache.dir = folder
