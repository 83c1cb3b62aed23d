"""`kvpress generate`: one answer under a contract, with the full cache beside it if asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpress.cli.console import err, megabytes, print_json, quiet_transformers
from kvpress.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvpress.contract import Contract
    from kvpress.run import Run


def generate(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, model folder or .gguf file.")],
    contract: Annotated[
        str | None,
        typer.Option(
            "--contract",
            "-c",
            help="Preset name or YAML file; default: snapkv, or full with --projection or --int8 and no budget.",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="0.25, 25%, 512tokens or 20MB; default: the contract's own.")
    ] = None,
    projection: Annotated[
        str | None, typer.Option("--projection", "-p", help="Projection file (`kvpress train projections`).")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="With --projection: share of a token's bytes; default: 0.5.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(help="With --projection: uniform (the default), or searched.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Store the cache in eight bits.")] = False,
    document: Annotated[
        str | None, typer.Option("--document", "-d", help="Text file; '-' or a pipe is read from stdin.")
    ] = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Question on the document.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: if there is one.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the full cache beside it.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    reference: Annotated[str | None, typer.Option(help="Reference answer; only oracle contracts need one.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Print tokens and bytes of each layer and head.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or triton (the GPU kernels).")] = "auto",
    store: Annotated[str, typer.Option(help="auto, packed or paged.")] = "auto",
    page_size: Annotated[int, typer.Option(help="Tokens a page of the paged store: 16, 32 or 64.")] = 32,
    graphs: Annotated[bool, typer.Option("--graphs", help="Replay decode steps as CUDA graphs.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code of the model.")] = False,
) -> None:
    """Answer a question on a document, or continue a text, with a compressed KV cache.

    The answer goes to stdout, figures to stderr.
    """
    text = read_document(document, question)
    from kvpress.backend import BackendRequest
    from kvpress.contract import resolve

    stores = projection is not None or int8
    # before the model is loaded: a misspelt name costs no minute
    chosen = stored_as(
        resolve(contract or ("full" if stores and budget is None else "snapkv"), budget), projection, share, ranks, int8
    )
    request = BackendRequest(backend, store, page_size, graphs)
    quiet_transformers()
    from kvpress.loading import load
    from kvpress.prompt import build_prompt

    with err.status(f"loading {model}"):
        loaded, tokenizer = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    prompt = build_prompt(tokenizer, text, question, chat=chat)
    arms = [None, chosen] if compare else [chosen]
    wanted = None
    if reference is not None:
        wanted = tokenizer(reference, add_special_tokens=False, return_tensors="pt")["input_ids"]
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "reference": wanted, "backend": request}
    if as_json:
        from kvpress.run import run

        runs = [run(loaded, tokenizer, prompt, arm, **settings) for arm in arms]
        print_json(to_json(model, loaded, chosen, runs))
        return
    runs = [stream(loaded, tokenizer, prompt, arm, settings, heading=compare) for arm in arms]
    err.print(table(runs))
    if graphs and runs[-1].report is not None:  # asked for by name, so what became of it is told
        err.print(f"decode: {runs[-1].report.to_dict()['decode']}", highlight=False)
    if report:
        err.print(str(runs[-1].report), markup=False, highlight=False)


def stored_as(
    contract: Contract, projection: str | None, share: float | None, ranks: str | None, int8: bool
) -> Contract:
    """The contract with the representation that the options ask for; its own where they ask for none."""
    from kvpress.contract import resolve
    from kvpress.slots.representation import Orthogonal

    if projection is None:
        if share is not None or ranks is not None:
            raise InputError("--share and --ranks belong to a projection: name its file with --projection")
        if not int8:
            return contract
        own = contract.representation
        return contract.swap(
            representation=own.model_copy(update={"int8": True}) if isinstance(own, Orthogonal) else "int8"
        )
    stored = {
        "kind": "orthogonal",
        "file": projection,
        "share": share or 0.5,
        "ranks": ranks or "uniform",
        "int8": int8,
    }
    return resolve(contract.swap(representation=stored))


def read_document(document: str | None, question: str | None) -> str:
    """The document's text: from a file, from stdin for "-" or a pipe, else empty where there is a question."""
    if document is None and sys.stdin.isatty():
        if question is None:
            raise InputError("nothing to read: give --document FILE, a text on stdin, or --question")
        return ""
    try:
        if document is None or document == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(document).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"document '{document}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"document '{document or '-'}' is no UTF-8 text: byte {error.start} cannot be read") from error


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    arm: Contract | None,
    settings: dict[str, Any],
    *,
    heading: bool,
) -> Run:
    """Run one arm and write its answer to stdout as it comes."""
    from transformers import TextStreamer

    from kvpress.run import FULL_CACHE, run

    if heading:
        err.rule(FULL_CACHE if arm is None else arm.name, align="left")
    # generate() adds the prompt's tokens first: skip_prompt drops them
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return run(model, tokenizer, prompt, arm, streamer=streamer, **settings)


def table(runs: list[Run]) -> Table:
    """One row a run: what was kept, how long it took."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("")
    for name in ("prompt", "kept", "cache", "prefill", "decode"):
        view.add_column(name, justify="right")
    for run in runs:
        kept = "all" if run.report is None else f"{run.report.to_dict()['kept_tokens']:,.0f}"
        speed = run.tokens_per_second
        cells = [f"{run.prompt_tokens:,} tokens", kept, megabytes(run.cache_bytes), f"{run.prefill_seconds:.2f} s"]
        view.add_row(run.contract, *cells, "-" if speed is None else f"{speed:.1f} tokens/s")
    return view


def to_json(name: str, model: PreTrainedModel, contract: Contract, runs: list[Run]) -> dict[str, Any]:
    """The object that `--json` prints."""
    import torch
    import transformers

    from kvpress import __version__

    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "contract": contract.name,
        "contract_id": contract.id,
        "versions": {"kvpress": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "runs": [run.to_dict() for run in runs],
    }
