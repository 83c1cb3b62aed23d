"""What every kernel's wrapper needs to launch it: the architecture, padded sizes, and checks of its operands.

Kernels run compiled on CUDA and ROCm devices, or in Triton's interpreter on CPU tensors when TRITON_INTERPRET=1 was
set before they were imported. The interpreter computes silently wrong results on bfloat16, so every kernel takes a
constexpr UPCAST that widens what it loads to float32; wrappers pass `INTERPRETED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

#: whether the kernels of this process run in Triton's interpreter
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
#: dtypes that the kernels read
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: log2(e): kernels work with powers of two
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


@lru_cache(maxsize=16)
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" and the like; "interpreter" for the interpreter."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=16)
def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; 4 in the interpreter, to exercise split work."""
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def padded(size: int) -> int:
    """The next power of two, at least 16: what `tl.dot` and `tl.arange` take."""
    return max(16, 1 << (size - 1).bit_length())


def check_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device on which kernels can run."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    kind = next(iter(devices)).type
    if kind != ("cpu" if INTERPRETED else "cuda"):
        raise ValueError(
            f"tensors are on '{kind}', but this process runs kernels "
            + ("in Triton's interpreter, which takes CPU tensors" if INTERPRETED else "on CUDA and ROCm devices")
        )


def check_dtype(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless kernels read the tensor's dtype."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; kernels read bfloat16, float16 and float32")


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of a kernel, to be compiled without a device.

    op: the op's name (file stem); config: a label that tells the configurations of an op apart, for example
    "D128 P32 bf16 values"; kernel: the jitted function; types: runtime argument -> Triton type ("*bf16", "*i64", "i32",
    "fp32"); constants: constexpr argument -> value; aligned: integer arguments that are multiples of 16 at run time
    (pointers always are); kv_loop: whether K and V stream through the kernel's loop, so that at least two buffers and
    loads of `load_bytes` are demanded.
    """

    op: str
    config: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    aligned: frozenset[str] = field(default_factory=frozenset)
    kv_loop: bool = False
    load_bytes: int = 16
