"""Which device and which dtype a model gets when the user names none.

bfloat16 on a CPU is a trap: without native bf16 dot products (AVX512-BF16, AMX) each matmul
converts its operands, and a forward pass takes about three times as long as in float32.
"""

from __future__ import annotations

import torch

from kvpress.errors import InputError
from kvpress_kernels.reference.cpu_route import has_native_dot

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
    """True where the CPU multiplies bfloat16 without converting it first; the decode path asks the same question."""
    return has_native_dot(torch.bfloat16)


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
