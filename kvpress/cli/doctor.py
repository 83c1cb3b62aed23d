"""`kvpress doctor`: what is installed, which devices there are, what works here and what does not."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Annotated, Any

import typer

from kvpress.cli.console import err, out, print_json, quiet_transformers

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "gguf", "numpy", "pydantic", "triton", "flash-attn")
HUB_SECONDS = 3


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None where the answer is neither good nor bad: something optional is absent."""

    name: str
    ok: bool | None
    detail: str


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Versions, devices, and what works on this machine. Exit code 1 if something that is needed does not."""
    quiet_transformers()
    with err.status("looking around"):
        sections = {"versions": versions(), "devices": devices(), "extras": extras(), "checks": checks()}
    if as_json:
        print_json({name: [vars(check) for check in section] for name, section in sections.items()})
    else:
        _print(sections)
    if any(check.ok is False for section in sections.values() for check in section):
        raise typer.Exit(1)


def _print(sections: dict[str, list[Check]]) -> None:
    from rich.table import Table

    marks = {True: "[green]ok[/]", False: "[red]NO[/]", None: "-"}
    for name, section in sections.items():
        table = Table(box=None, pad_edge=False, show_header=False, title=name, title_justify="left", title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, min_width=2)
        table.add_column()
        for check in section:
            table.add_row(check.name, marks[check.ok], check.detail)
        out.print(table)
        out.print()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[Check]:
    """This package, Python, and the distributions that decide what works."""
    from kvpress import __version__

    found = [Check("kvpress-engine", True, __version__), Check("python", True, platform.python_version())]
    for name in PACKAGES:
        version = _version(name)
        optional = name in ("triton", "flash-attn")
        found.append(Check(name, True if version else None if optional else False, version or "not installed"))
    return found


def devices() -> list[Check]:
    """CPU and GPUs, with what decides their speed."""
    import torch

    from kvpress.device import cpu_has_native_bf16
    from kvpress.memory import available_bytes

    native = cpu_has_native_bf16()
    cpu = torch.device("cpu")
    found = [
        Check("cpu", True, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Check("cpu memory", True, f"{available_bytes(cpu) / 1e9:.1f} GB available"),
        Check("cpu bfloat16", True if native else None, "native" if native else "converted: float32 is faster here"),
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Check(f"cuda:{index}", True, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"))
    if not torch.cuda.is_available():
        found.append(Check("gpu", None, "none that torch can use"))
    return found


def extras() -> list[Check]:
    """The optional parts of this distribution, and whether what they need is installed."""
    try:
        requirements = metadata.distribution("kvpress-engine").requires or []
        names = metadata.distribution("kvpress-engine").metadata.get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return [Check("extras", None, "unknown: kvpress-engine runs from its sources, without being installed")]
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in requirements]
    found = []
    for extra in names:
        needs = [
            r.name
            for r in parsed
            if r.marker and not r.marker.evaluate({"extra": ""}) and r.marker.evaluate({"extra": extra})
        ]
        missing = [name for name in needs if _version(name) is None]
        detail = f"lacks {', '.join(missing)}" if missing else "installed" if needs else "needs nothing yet"
        found.append(Check(extra, None if missing else True, detail))
    return found


def checks() -> list[Check]:
    """Small runs of what the engine stands on."""
    return [_sdpa(), _compression(), _flash(), *_kernels(), _presets(), _namesake(), _hub()]


def _try(name: str, works: Any, detail: str) -> Check:
    try:
        works()
    except Exception as error:  # a diagnosis: whatever goes wrong is the finding
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, True, detail)


def _sdpa() -> Check:
    import torch

    def works() -> None:
        query = torch.randn(1, 2, 3, 8)
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)

    return _try("sdpa attention", works, "prefill attention, every device")


def _compression() -> Check:
    """Compress a tiny random model: the whole path but for its size."""

    def works() -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from kvpress.session import compress

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)).eval()
        ids = torch.arange(1, 1 + 128).remainder(31)[None] + 1
        with compress(model, "snapkv", budget=0.5) as session:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
        report = session.report().to_dict()
        if not report["cache_bytes"] < report["full_bytes"]:
            raise RuntimeError(f"cache of {report['cache_bytes']} bytes is not smaller than {report['full_bytes']}")

    return _try("compressed generate", works, "tiny model, snapkv at 50 %: the cache is smaller")


def _flash() -> Check:
    version = _version("flash-attn")
    return Check("flash attention", True if version else None, version or "absent: prefill runs on sdpa")


def _kernels() -> list[Check]:
    """Which kernels can run here, and why not; on a device each of them is launched once."""
    import torch

    from kvpress_kernels.dispatch import interpreted, why_no_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = why_no_kernels(device)
    if interpreted():
        return [Check("triton kernels", None, "in Triton's interpreter (TRITON_INTERPRET=1 is set), for tests only")]
    if obstacle:
        return [Check("triton kernels", None, f"attention and evidence run on torch: {obstacle}")]
    from kvpress_kernels.check.smoke import SMOKE

    return [
        _try(f"kernel {name}", partial(launch, device), "compiled, ran, agrees with its reference")
        for name, launch in SMOKE.items()
    ]


def _presets() -> Check:
    from kvpress.contract import preset_names, resolve

    names = preset_names()
    check = _try("presets", lambda: [resolve(name) for name in names], f"{len(names)} contracts, all valid")
    return check if names else Check("presets", False, "none found: the installation is incomplete")


def _namesake() -> Check:
    # with NVIDIA's distribution here, importing this package would have stopped already
    return Check("NVIDIA's kvpress", True, "not installed: no conflict over the import name")


def _hub() -> Check:
    """One request with a short timeout; offline is no fault, since folders and .gguf files need no hub."""
    from concurrent.futures import ThreadPoolExecutor
    from http.client import HTTPException
    from urllib.request import urlopen

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Check("model hub", None, "offline mode is set (HF_HUB_OFFLINE)")
    pool = ThreadPoolExecutor(1)  # urlopen's timeout does not cover the look-up of the host's name
    try:
        pool.submit(lambda: urlopen(constants.ENDPOINT, timeout=HUB_SECONDS).close()).result(timeout=HUB_SECONDS + 1)
    except (OSError, TimeoutError, HTTPException):
        return Check("model hub", None, f"no answer within {HUB_SECONDS} s: use folders and .gguf files")
    finally:
        pool.shutdown(wait=False)
    return Check("model hub", True, "reachable")
