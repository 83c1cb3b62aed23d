"""What the commands share: answers go to stdout, everything about them to stderr."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console

out = Console()
err = Console(stderr=True)


def print_json(data: Any) -> None:
    """One JSON object on stdout, for machines: no colours, no wrapping."""
    print(json.dumps(data, indent=2, allow_nan=False))


def megabytes(n_bytes: int) -> str:
    """Bytes as MB of 10^6, the unit in which `--budget 20MB` is read."""
    return f"{n_bytes / 1e6:.1f} MB"


def quiet_transformers() -> None:
    """No progress bars and warnings of transformers between our lines. For commands only: it is process-wide."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bar of GGUF files heeds nothing else; hub downloads keep theirs
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
