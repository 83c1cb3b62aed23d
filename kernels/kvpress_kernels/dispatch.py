"""Which implementation of an op runs: the plain torch one, or the Triton kernel of the same signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

BackendName = Literal["torch", "triton"]

#: largest head dimension that the kernels are compiled for
MAX_HEAD_DIM = 256


@lru_cache(maxsize=64)
def op(name: str, backend: BackendName) -> Callable[..., Any]:
    """The function called `name`: kvpress_kernels.<name> for triton, kvpress_kernels.reference.<name> for torch."""
    package = "kvpress_kernels" if backend == "triton" else "kvpress_kernels.reference"
    function: Callable[..., Any] = getattr(import_module(f"{package}.{name}"), name)
    return function if backend == "torch" else _on_its_device(function)


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which is not where a layer of a model on several devices lies."""

    @wraps(function)
    def guarded(first: Any, *args: Any, **options: Any) -> Any:
        device = first.device  # of a tensor, or of pages
        if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
            return function(first, *args, **options)
        with torch.cuda.device(device):
            return function(first, *args, **options)

    return guarded


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter, on CPU tensors."""
    if find_spec("triton") is None:
        return False
    from kvpress_kernels.launch import INTERPRETED

    return INTERPRETED


def why_no_kernels(
    device: torch.device, dtype: torch.dtype | None = None, head_dims: tuple[int, ...] = ()
) -> str | None:
    """Why the kernels cannot serve tensors of this kind here, as the end of a sentence; None where they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        from kvpress_kernels.launch import DTYPES
    except ImportError as error:
        return f"Triton is installed but cannot be imported ({error})"

    if interpreted() and device.type != "cpu":
        return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors"
    if not interpreted() and device.type != "cuda":
        return f"the kernels need a CUDA or ROCm device, and this is '{device}'"
    if dtype is not None and dtype not in DTYPES:
        return f"the kernels read bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
    too_large = [dim for dim in head_dims if dim > MAX_HEAD_DIM]
    if too_large:
        return f"the kernels take head dimensions up to {MAX_HEAD_DIM}, not {too_large[0]}"
    return None
