"""Which device and which dtype a model gets when the user names none.

bfloat16 on a CPU is a trap: without native bf16 dot products (AVX512-BF16, AMX, Arm's BF16 extension) each matmul
converts its operands, and a forward pass takes about three times as long as in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch

from kvpress.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the first CUDA/ROCm device if there is one, else the CPU.

    Raises InputError for a name that torch does not know or a device that this machine lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device '{name}': use 'cpu', 'cuda' or 'cuda:N'") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"device '{name}' is not there: torch sees {count} CUDA/ROCm devices on this machine")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there: torch sees no Apple GPU on this machine")
    return device


def cpu_has_native_bf16() -> bool:
    """True where the CPU multiplies bfloat16 without converting it first."""
    # helpers of torch 2.8 to 2.13 that carry an underscore: a release without them falls through to the kernel's list
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, name, None)
        if supported is not None and supported():
            return True
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # x86 lists "flags", Arm "Features"; each core has the same line, so the first one is enough
    flags = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))), "")
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())


def pick_dtype(name: str, device: torch.device, checkpoint: torch.dtype | None) -> torch.dtype:
    """The dtype called `name`; for "auto" the checkpoint's own, or on a CPU the fastest that holds its weights.

    `checkpoint` is the dtype that the weights are stored in, None where that is a quantised format.
    Raises InputError for an unknown name.
    """
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"unknown dtype '{name}': use 'auto', {', '.join(map(repr, DTYPES))}")
        return DTYPES[name]
    if device.type == "cpu":
        half = checkpoint is None or checkpoint.itemsize <= 2
        return torch.bfloat16 if half and cpu_has_native_bf16() else torch.float32
    return checkpoint if checkpoint is not None else torch.bfloat16
