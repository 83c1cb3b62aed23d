"""`kvpress.load`: a model and its tokenizer from a hub id, a local folder or a .gguf file.

    model, tokenizer = kvpress.load("Qwen/Qwen2.5-0.5B-Instruct")
    model, tokenizer = kvpress.load("models/llama-3.2-1b.Q4_K_M.gguf", dtype="bfloat16", device="cuda")

Plain transformers objects come back: nothing about them is special to this package. Weights are read from
safetensors or GGUF only, because the older .bin format runs code when it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvpress.device import pick_device, pick_dtype
from kvpress.errors import InputError, KvpressError, UnsupportedModelError
from kvpress.session import remember_tokenizer
from kvpress.support import check_model

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Origin:
    """Where the files are: `name` is a folder or a hub id, `gguf` a file in that folder or None."""

    name: str
    gguf: str | None = None

    def __str__(self) -> str:
        return f"'{Path(self.name) / self.gguf}'" if self.gguf else f"'{self.name}'"

    @property
    def local(self) -> bool:
        return Path(self.name).is_dir()

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained` that reads these files."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def load(
    source: str | Path, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, and its tokenizer.

    source: a hub id, a folder with config.json and *.safetensors, or a .gguf file, whose weights are dequantised.
    dtype: "auto", "float32", "float16", "bfloat16" or "float64". "auto" is the checkpoint's dtype on a GPU; on a CPU
        it is bfloat16 where the CPU has native bf16 dot products, else float32.
    device: "cpu", "cuda", "cuda:N"; None takes the first GPU if there is one.
    trust_remote_code: run the Python code that some hub models bring with them.

    Raises InputError for files, names and devices that cannot be used, UnsupportedModelError for a model whose cache
    cannot be compressed here; each message is one sentence.
    """
    origin = find_origin(source)
    target = pick_device(device)
    with one_sentence(origin, target):
        checkpoint = None
        if origin.gguf is None:
            config = AutoConfig.from_pretrained(origin.name, trust_remote_code=trust_remote_code)
            checkpoint = config.dtype or torch.float32
            _check_before_weights(origin, config, trust_remote_code)
        weights_dtype = pick_dtype(dtype, target, checkpoint)
        tokenizer = _load_tokenizer(origin, trust_remote_code)
        model, info = AutoModelForCausalLM.from_pretrained(
            origin.name,
            dtype=weights_dtype,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # reported below, in one sentence instead of a table
            output_loading_info=True,
            **_weights_arguments(origin),
        )
        _check_weights(origin, info)
        if origin.gguf is not None:
            _forget_quantisation(model)
        check_model(model)
        model = model.to(target)
    remember_tokenizer(model, tokenizer)
    return model, tokenizer


def load_tokenizer(source: str | Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """The tokenizer and the config of a model whose weights are not needed; source and errors as in `load`."""
    origin = find_origin(source)
    with one_sentence(origin, torch.device("cpu")):
        return _load_tokenizer(origin, False), AutoConfig.from_pretrained(origin.name, **origin.arguments)


def find_origin(source: str | Path) -> Origin:
    """Tell a .gguf file, a local folder and a hub id apart; raises InputError for what is none of them."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"no such file: '{source}'")
        return Origin(str(path.parent), path.name)
    if path.is_dir():
        return _check_folder(path)
    if path.exists():
        raise InputError(f"'{source}' is neither a model folder nor a .gguf file")
    if not HUB_ID.fullmatch(str(source)):
        raise InputError(f"no such folder: '{source}'")
    return Origin(str(source))


def _check_folder(folder: Path) -> Origin:
    if not (folder / "config.json").is_file():
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"; name a file in it, such as '{folder / gguf[0]}'" if gguf else ""
        raise InputError(f"'{folder}' is no model folder: it has no config.json{hint}")
    if not any(folder.glob("*.safetensors")):
        found = "only .bin weights, which run code when opened" if any(folder.glob("*.bin")) else "no weights"
        raise InputError(f"'{folder}' has {found}: weights must be *.safetensors or a .gguf file")
    return Origin(str(folder))


def _check_before_weights(origin: Origin, config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Refuse a model that cannot be compressed before its weights are downloaded or read."""
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{origin} is an encoder-decoder model ({config.model_type}): only decoder-only models are supported"
        )
    with torch.device("meta"):  # shapes without memory
        check_model(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def _load_tokenizer(origin: Origin, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(origin.name, trust_remote_code=trust_remote_code, **origin.arguments)
    except Exception as error:
        # the wording of transformers 5.13 to 5.23 where none of a tokenizer's files is there
        if "backend tokenizer" in str(error):
            raise InputError(f"{origin} has no tokenizer: a tokenizer.json must lie beside its weights") from error
        if origin.local and origin.gguf is None and "trust_remote_code" not in str(error):
            raise InputError(f"the tokenizer of {origin} cannot be read ({_first_line(error)})") from error
        raise


def _check_weights(origin: Origin, info: dict[str, Any]) -> None:
    """Refuse weights that do not fill the model: transformers puts random numbers in their place and only warns."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{origin} lacks {len(missing)} weights that the model needs, '{missing[0]}' among them")
    if info["mismatched_keys"]:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise InputError(
            f"{origin} has {len(names)} weights of another shape than its config.json says, '{names[0]}' among them"
        )


def _weights_arguments(origin: Origin) -> dict[str, Any]:
    if origin.gguf is None:
        return {"use_safetensors": True}
    arguments = dict(origin.arguments)
    try:
        from transformers import GgufConfig
    except ImportError:  # before transformers 5.20 GGUF weights are always dequantised
        return arguments
    # else, with the Hugging Face `kernels` distribution installed, the weights stay packed and the attention function
    # is replaced by one that this package does not know
    return {**arguments, "quantization_config": GgufConfig(dequantize=True)}


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Take the marks of a quantised model off a dequantised one, so that it can be moved, cast and saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.__dict__.pop("quantization_config", None)


@contextmanager
def one_sentence(origin: Origin, device: torch.device) -> Iterator[None]:
    """Turn what transformers, safetensors and gguf raise about the user's files into one sentence each."""
    try:
        yield
    except KvpressError:
        raise
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
        raise InputError(
            f"{origin} does not fit on '{device}', which has {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free: "
            "use a smaller dtype, another device or a smaller model"
        ) from error
    except SafetensorError as error:
        raise InputError(f"{origin} has a damaged safetensors file ({_first_line(error)}): fetch it again") from error
    except Exception as error:
        # damaged files fail in any way: gguf with struct.error, tokenizers' Rust code with a plain Exception
        raise _translate(origin, error) from error


def _translate(origin: Origin, error: Exception) -> KvpressError:
    """The sentence for an error of transformers, told by its cause, or by its wording where it has no type of its own."""
    message, cause = str(error), type(error.__cause__).__name__
    if "trust_remote_code" in message:
        return InputError(f"{origin} brings its own Python code: pass trust_remote_code=True (--trust-remote-code)")
    unknown_type = re.search(r"model type `([^`]+)`|with architecture (\S+) is not supported", message)
    if unknown_type:
        name = unknown_type.group(1) or unknown_type.group(2)
        return UnsupportedModelError(f"{origin} is a model of type '{name}', which this transformers does not know")
    if "Unrecognized configuration class" in message:
        return UnsupportedModelError(f"{origin} is not a causal language model")
    if origin.gguf is not None:
        return InputError(f"{origin} is no GGUF file or a damaged one ({_first_line(error)}): fetch it again")
    if origin.local:
        return InputError(f"{origin} cannot be loaded: {_first_line(error)}")
    if cause == "RepositoryNotFoundError":
        return InputError(f"no model {origin}: there is no such folder, and the hub has none of that name")
    if cause == "GatedRepoError":
        return InputError(f"{origin} is a gated model: accept its terms on the hub and log in first")
    if cause in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return InputError(
            f"no model {origin}: there is no such folder, and the model hub cannot be reached from this machine"
        )
    return InputError(f"{origin} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
