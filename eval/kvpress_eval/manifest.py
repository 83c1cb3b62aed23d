"""The manifest of a run: everything that its numbers depend on, written before the first answer.

A run that is resumed must find the same model, tokenizer, contracts and data; other versions of the software are noted
beside the first ones, and the report shows them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress.errors import InputError
from kvpress.files import write_atomically
from kvpress_eval.arms import Arm
from kvpress_eval.sweep import Sweep

NAME = "manifest.json"
#: parts that a resumed run must share with the first one
FIXED = ("sweep", "arms", "model", "tokenizer")
MAX_BYTES = 16 * 1024 * 1024


def describe(
    sweep: Sweep, arms: Sequence[Arm], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The manifest of a run that begins now; data files are added as they are read."""
    described = {
        "format": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sweep": sweep.model_dump(mode="json"),
        "margins": sweep.margins.model_dump(),
        "arms": {arm.name: None if arm.contract is None else json.loads(arm.contract.canonical_json()) for arm in arms},
        "model": describe_model(sweep.model, model),
        "tokenizer": _sha(tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)),
        "data": {},
        "tasks": {},
        "software": [software(model)],
    }
    return {"run": run_digest(described), **described}


def run_digest(manifest: dict[str, Any]) -> str:
    """Digest of what a run must keep: sweep, arms, model and tokenizer."""
    kept = json.dumps({part: manifest[part] for part in FIXED}, sort_keys=True)
    return _sha(kept)


def describe_model(source: str, model: PreTrainedModel) -> dict[str, Any]:
    """Name, shape, dtype and a digest of the configuration and of samples of every weight."""
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        # a few numbers of every tensor tell two checkpoints apart, without reading all of a large model again
        digest.update(name.encode() + flat[:: max(flat.numel() // 16, 1)][:16].float().cpu().numpy().tobytes())
    return {
        "source": Path(source).name or source if Path(source).exists() else source,
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "commit": getattr(model.config, "_commit_hash", None),
        "digest": digest.hexdigest()[:16],
    }


def software(model: PreTrainedModel) -> dict[str, Any]:
    """What runs it: versions, commit of a checkout, device, attention implementation."""
    return {
        "kvpress-engine": _version("kvpress-engine"),
        "commit": _commit(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "device": device_name(model),
        "attention": str(model.config._attn_implementation).removeprefix("kvpress_"),
    }


def device_name(model: PreTrainedModel) -> str:
    """The device's own name, for a CPU its architecture and threads."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest of a run in one step.

    Raises:
        InputError: the folder cannot be written.
    """
    write_atomically(folder / NAME, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        InputError: there is none, or it is no manifest.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"'{path}' is too large for a manifest")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"'{folder}' holds no run: there is no {NAME} in it") from None
    except (OSError, ValueError) as error:
        raise InputError(f"'{path}' cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != 1 or not all(part in found for part in FIXED):
        raise InputError(f"'{path}' is no manifest of this version")
    return found


def update(folder: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Change the manifest of a run while no other process does."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = read(folder)
        before = json.dumps(manifest)
        change(manifest)
        if json.dumps(manifest) != before:
            write(folder, manifest)
    return manifest


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise InputError if a run is resumed with something else than it began with."""
    for part in FIXED:
        if json.loads(json.dumps(old[part])) != json.loads(json.dumps(new[part])):
            raise InputError(f"'{folder}' was begun with another {part}: resume with the same, or begin a new run")


def check_data(manifest: dict[str, Any], used: dict[str, str]) -> None:
    """Raise InputError if a data file is not what it was when the run began; note the new ones."""
    for name, digest in used.items():
        if manifest["data"].setdefault(name, digest) != digest:
            raise InputError(f"data file {name} has changed since the run began: bring it back, or begin a new run")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, with a mark if files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", __file__)
    commit = git("rev-parse", "HEAD") if tracked else None
    return None if not commit else commit + ("+changes" if git("status", "--porcelain", "-uno") else "")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
