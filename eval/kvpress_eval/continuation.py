"""How well a text goes on from a compressed context: every arm reads the beginning of a window, is cut, and is asked for the rest.

    context     read once for all arms, exactly; each arm cuts and stores it its own way
    rest        read over what each arm has stored, a few tokens at a time

loss is the cross-entropy of the text, kl is KL(full || arm); both in nats a token, over the rest but its first token, which all arms see
from the exact context. Unlike perplexity in reduced attention throughout, this is what an engine does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel

from kvpress.cache import CompressedCache, FanOut, can_join, join, shares_prefill
from kvpress.errors import InputError
from kvpress.matryoshka.distillation import distance
from kvpress_eval.arms import Arm
from kvpress_eval.diagnostic.quantity import mean_over_cells
from kvpress_eval.records import FULL, RecordFile

#: numbers of logits of one forward pass over the rest
LOGITS = 1 << 27


class WindowRecord(BaseModel):
    """One window under one arm. text: digest of the windows and of the model that read them; document: number of the window's; kept_bytes,
    full_bytes: of the context, measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    window: int
    document: int
    arm: str
    contract_id: str
    kl: float
    loss: float
    kept_bytes: int
    full_bytes: int


def check_arms(arms: Sequence[Arm]) -> None:
    """Raise InputError unless all arms can read and go on together."""
    for arm in arms:
        assert arm.contract is not None
        if arm.contract.query_law.origin == "oracle":
            raise InputError(f"arm '{arm.name}' needs a reference answer, which a text does not have: leave it out")
        if not (shares_prefill(arm.contract) and can_join(arm.contract)):
            raise InputError(f"arm '{arm.name}' evicts before or behind the end of the context: leave it out")


def measure_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    arms: Sequence[Arm],
    windows: Tensor,
    rest: int,
    path: Path,
    text: str,
    watch: Callable[[int, int], None] = lambda done, total: None,
    documents: Sequence[int] | None = None,
) -> list[WindowRecord]:
    """Records of all windows [m, n] under all arms, appended to a file as they are made; windows that are there are not read again.

    rest: tokens behind the context. text: digest that records of these windows carry. documents: of each window, the number of its document;
    None where every window has one of its own.

    Raises:
        InputError: an arm cannot be measured, the file holds records of something else, or cannot be written.
    """
    check_arms(arms)
    if not 2 <= rest < windows.shape[1]:
        raise InputError(
            f"a rest of {rest} tokens does not fit into windows of {windows.shape[1]:,}: give 2 or more, and fewer"
        )
    found = read_window_records(path) if path.exists() else []
    ids = {arm.name: arm.contract.id for arm in arms if arm.contract is not None}
    if any(one.text != text or ids.get(one.arm) != one.contract_id for one in found):
        raise InputError(f"'{path}' holds records of another text, model or of other arms: name another file")
    done = {(one.window, one.arm) for one in found}
    sources = range(len(windows)) if documents is None else documents
    with RecordFile(path, WindowRecord) as file:
        for index, window in enumerate(windows):
            if any((index, arm.name) not in done for arm in arms):
                made = _measure(model, tokenizer, arms, window, rest, (index, sources[index]), text)
                new = [one for one in made if (index, one.arm) not in done]
                file.append(new)
                found += new
            watch(index + 1, len(windows))
    return found


@torch.inference_mode()
def _measure(
    model: PreTrainedModel,
    tokenizer: Any,
    arms: Sequence[Arm],
    window: Tensor,
    rest: int,
    at: tuple[int, int],
    text: str,
) -> list[WindowRecord]:
    ids = window[None].to(model.device)
    n = ids.shape[1] - rest
    caches = [CompressedCache(model, arm.contract, tokenizer=tokenizer) for arm in arms]  # type: ignore[arg-type]
    try:
        model(input_ids=ids[:, :n], past_key_values=FanOut(caches), use_cache=True, logits_to_keep=1)
        held = [sum(layer.nbytes for layer in cache.compressed_layers) + cache.other_nbytes for cache in caches]
        full = caches[0].report().to_dict()["full_bytes"]
        batch = join(caches)
        try:
            sums = _read_rest(model, batch, ids[:, n:], len(arms))
        finally:
            batch.close()
    finally:
        for cache in caches:
            cache.close()
    return [
        WindowRecord(
            text=text, window=at[0], document=at[1], arm=arm.name, contract_id=arm.contract.id if arm.contract else "", kl=kl, loss=loss,
            kept_bytes=kept, full_bytes=full,
        )
        for arm, kept, (kl, loss) in zip(arms, held, sums, strict=True)
    ]  # fmt: skip


def _read_rest(model: PreTrainedModel, batch: CompressedCache, ids: Tensor, rows: int) -> list[tuple[float, float]]:
    """(kl, loss) of every row; the first row is the full cache. ids: [1, m]."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    step = max(1, LOGITS // (rows * vocabulary))
    kl, loss = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    n = ids.shape[1] - 1
    for start in range(0, n, step):
        part = ids[:, start : min(start + step, n)]
        logits = model(input_ids=part.expand(rows, -1), past_key_values=batch, use_cache=True).logits
        # the last position predicts the first token of the next part, so that token goes along
        along = ids[:, start : start + part.shape[1] + 1]
        padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
        for row in range(rows):
            measured = distance(padded[:1], padded[row : row + 1], along)
            kl[row] += float(measured.kl.sum())
            loss[row] += float(measured.cross_entropy.sum())
    return list(zip((kl / n).tolist(), (loss / n).tolist(), strict=True))


def read_window_records(path: Path) -> list[WindowRecord]:
    """Records of a file; a last line that was cut short is left out.

    Raises:
        InputError: another line is no record.
    """
    found = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(WindowRecord.model_validate_json(line))
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"'{path}' line {number} is no record of a window: delete that line") from None
    return found


def summary(records: Iterable[WindowRecord], of: str | None = None) -> list[dict[str, Any]]:
    """A row for each arm: bytes, kl and loss with 95 % intervals over the documents, perplexity, and the paired loss against the full cache.

    of: the arm whose bytes are the whole, where a model computes in a wider dtype than it is served in; None for the full cache of the
    model's own dtype.
    """
    by_arm = _by_arm(records)
    full = by_arm.get(FULL, {})
    whole = {index: one.full_bytes for index, one in full.items()}
    if of is not None:
        whole = {index: one.kept_bytes for index, one in by_arm[of].items()}
    rows = []
    for arm, windows in by_arm.items():
        common = sorted(windows.keys() & full.keys() & whole.keys())
        mine = [windows[index] for index in common]
        changes = [windows[index].loss - full[index].loss for index in common]
        documents = [one.document for one in mine]
        rows.append(
            {
                "arm": arm,
                "windows": len(common),
                "documents": len(set(documents)),
                "kept_bytes": sum(one.kept_bytes for one in mine) / max(len(mine), 1),
                "byte_share": sum(one.kept_bytes for one in mine) / max(sum(whole[index] for index in common), 1),
                "perplexity": math.exp(sum(one.loss for one in mine) / max(len(mine), 1)),
                **_with_interval("kl", [one.kl for one in mine], documents),
                **_with_interval("loss_change", changes, documents),
            }
        )
    return rows


def compared(records: Iterable[WindowRecord], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row for each pair of arms: the first's kl and loss less the second's on the same windows, with 95 % intervals, and in how many windows
    its kl is lower.

    Raises:
        InputError: there are no records of an arm.
    """
    by_arm = _by_arm(records)
    rows = []
    for pair in pairs:
        for name in pair:
            if name not in by_arm:
                raise InputError(f"there is no arm '{name}' to compare: give two of {', '.join(by_arm)}")
        one, other = (by_arm[name] for name in pair)
        common = sorted(one.keys() & other.keys())
        documents = [one[index].document for index in common]
        differences = {
            name: [getattr(one[index], name) - getattr(other[index], name) for index in common]
            for name in ("kl", "loss")
        }
        rows.append(
            {
                "arm": pair[0],
                "than": pair[1],
                "windows": len(common),
                "lower": sum(value < 0 for value in differences["kl"]),
                **_with_interval("kl", differences["kl"], documents),
                **_with_interval("loss", differences["loss"], documents),
            }
        )
    return rows


def _by_arm(records: Iterable[WindowRecord]) -> dict[str, dict[int, WindowRecord]]:
    found: dict[str, dict[int, WindowRecord]] = {}
    for record in records:
        found.setdefault(record.arm, {})[record.window] = record
    return found


def _with_interval(name: str, values: Sequence[float], documents: Sequence[int]) -> dict[str, float | None]:
    """Mean and interval of one value a window; windows of one document are no independent draws, so documents are left out one by one."""
    if not values:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    found = mean_over_cells("points", np.array(values), np.array(documents))
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
