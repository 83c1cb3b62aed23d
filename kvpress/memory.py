"""Out of memory, explained: what was asked for and what would fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvpress.errors import InputError

if TYPE_CHECKING:
    from kvpress.cache import CompressedCache


@contextmanager
def explain_out_of_memory(cache: CompressedCache, n_tokens: int) -> Iterator[None]:
    """Turn an allocator's error into one sentence. n_tokens: columns of the prompt."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in text:
            raise
        asked = re.search(r"allocate ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", text)
        size = asked.group(1) if asked else "more memory than there is"
        device = next((layer.device for layer in cache.compressed_layers if layer.is_initialized), torch.device("cpu"))
        free = available_bytes(device)
        raise InputError(
            f"out of memory on {device}: {size} was asked for while a prompt of {n_tokens:,} tokens was read, and "
            f"{free / 2**20:,.0f} MiB are free; {_what_fits(cache, n_tokens, free)}"
        ) from None


def _what_fits(cache: CompressedCache, n_tokens: int, free: int) -> str:
    """Advice from the bytes that one token takes in one layer while the prompt is read."""
    layer = next((layer for layer in cache.compressed_layers if layer.is_initialized), None)
    if layer is None or (layer.storage.store is None and layer.storage.dense is None):
        return "a shorter prompt would fit, or generate(prefill_chunk_size=512) with schedule per_prefill_chunk"
    per_token = layer.storage.packing.native_bytes * layer.storage.n_heads * layer.storage.n_rows
    per_token *= cache.plan.n_layers if cache.plan.needs_all_layers or not cache.plan.evicts else 1
    fits = min(n_tokens, free // max(per_token, 1))
    return (
        f"keys and values of about {fits:,} tokens would fit in that; read the prompt in parts with "
        f"generate(prefill_chunk_size=512) and schedule per_prefill_chunk, or lower the batch size"
    )


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; for the CPU what the system calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
