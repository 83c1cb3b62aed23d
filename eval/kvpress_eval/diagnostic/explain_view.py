"""An explanation on the terminal, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvpress_eval.diagnostic.explain import Explanation, Piece
from kvpress_eval.diagnostic.finding import Finding
from kvpress_eval.diagnostic.words import base_sentence, replay_rows, verdict_sentence
from kvpress_eval.report.losses import shorten
from kvpress_eval.report.text import DASH, number

STYLES = {"kept": "", "some": "yellow", "evicted": "dim"}
#: tokens shown on either side of each fact when not everything is
AROUND = 24
#: runs of contested tokens that are named
CONTESTED = 6


def to_json(found: Explanation) -> dict[str, Any]:
    """One object: the record's names, both answers, the finding, and the pieces of the text."""
    record, full = found.record, found.full
    return {
        "task": record.task,
        "length": record.length,
        "sample": record.sample,
        "mode": record.mode,
        "arm": record.arm,
        "answers": list(record.answers),
        "full": {"score": full.score, "prediction": full.prediction, "kept_bytes": full.kept_bytes},
        "answer": {"score": record.score, "prediction": record.prediction, "kept_bytes": record.kept_bytes},
        "sentence": _sentences(found),
        "base": None
        if found.base is None
        else {"arm": found.base.arm, "slots": list(found.slots), "score": found.base.score},
        "finding": found.finding.model_dump(mode="json"),
        "pieces": [asdict(piece) | {"fate": piece.fate} for piece in found.pieces],
    }


def view(found: Explanation, everything: bool = False) -> Group:
    """What a reader wants to know, from the verdict down to the text; with `everything` the whole prompt."""
    parts: list[RenderableType] = [
        Text(f"{found.record.task}  sample {found.record.sample}  {found.record.mode.replace('_', '-')}", "bold"),
        Text(_sentences(found)),
        Text(),
        _answers(found),
    ]
    if found.finding.replays:
        parts += [Text(), _replays(found.finding)]
    parts += [Text(), _measures(found.finding), Text(), _legend(found), _text(found, everything)]
    contested = _contested(found.pieces)
    if contested is not None:
        parts += [Text(), contested]
    return Group(*parts)


def _sentences(found: Explanation) -> str:
    verdict = verdict_sentence(found.record.arm, found.finding)
    if found.base is None:
        return verdict
    scores = found.base.score, found.record.score, found.full.score
    return f"{verdict} {base_sentence(found.base.arm, found.slots, *scores)}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _answers(found: Explanation) -> Table:
    table = _table("answers", "", "score", "MB kept", "text")
    table.add_row("wanted", "", "", Text(shorten("; ".join(found.record.answers))))
    shown = {
        "full cache": found.full,
        **({found.base.arm: found.base} if found.base else {}),
        found.record.arm: found.record,
    }
    for name, one in shown.items():
        table.add_row(name, f"{one.score:.2f}", f"{one.kept_bytes / 1e6:.1f}", Text(shorten(one.prediction.strip())))
    return table


def _replays(finding: Finding) -> Table:
    table = _table(
        "the same sample with parts of the arm replaced",
        "replaced",
        "exchanged",
        "logit margin",
        "score",
        "answer back",
    )
    for row in replay_rows(finding.replays):
        table.add_row(*row, style="green" if row[-1] == "yes" else "")
    return table


def _measures(finding: Finding) -> Table:
    """The stages in numbers, one line each."""
    table = _table("stages", "stage", "what was measured")
    access, value, fit = finding.access, finding.value, finding.fit
    if access is not None:
        gold = (
            ""
            if access.gold_tokens is None
            else f"; {access.gold_tokens:.0%} of the evidence's tokens kept, {number(_percent(access.gold_whole), 0)} % of the facts whole"
        )
        table.add_row(
            "I access",
            f"{access.kept_decode:.0%} of what decoding reads is kept{gold}; distance of the arm's own law from it "
            f"{number(access.tv_decode, 2)}; first step {access.tv_first:.2f}, at most {access.tv_phase:.2f} + {access.tv_fit:.2f}",
        )
    if value is not None:
        table.add_row(
            "II value",
            f"attention output changes by {value.measured:.0%} while decoding, {value.predicted:.0%} were to be expected from the "
            f"prompt's end; agreement over heads {number(value.agreement, 2)}",
        )
    if fit is not None:
        table.add_row(
            "III fit",
            f"{fit.eps_lat} tokens of the budget unused, {fit.ties} ties, {number(_percent(fit.kept_mass), 0)} % of the evidence mass kept",
        )
    margin = finding.margin
    if margin is not None:
        wrong = "never leaves it" if margin.first_wrong is None else f"leaves it at token {margin.first_wrong + 1}"
        table.add_row(
            "answer",
            f"along the {'full cache' if margin.reference == 'full' else 'right'} answer: {wrong}; smallest logit margin "
            f"{margin.lowest:+.2f}, KL from the full cache {margin.divergence:.3f} nats a token",
        )
    return table


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _legend(found: Explanation) -> Text:
    n = sum(piece.n for piece in found.pieces)
    by_fate = {fate: sum(piece.n for piece in found.pieces if piece.fate == fate) for fate in STYLES}
    legend = Text("text: ", "bold")
    for fate, what in (("kept", "kept by most heads"), ("some", "by some"), ("evicted", "by none")):
        legend.append(f"{what} ({by_fate[fate] / max(n, 1):.0%})", STYLES[fate])
        legend.append("  ")
    if found.finding.gold:
        legend.append("evidence", "bold underline")
        legend.append("  ")
        legend.append("evidence that no head keeps", "bold underline red")
    return legend


def _text(found: Explanation, everything: bool) -> Text:
    text, shown_to = Text(), 0
    for start, end in [(0, 10**9)] if everything else _windows(found):
        if start > shown_to:
            text.append(f" [... {start - shown_to} tokens ...] ", "cyan")
        for piece in found.pieces:
            if piece.first < end and piece.first + piece.n > start:
                text.append(_clipped(piece, start, end), _style(piece))
        shown_to = end
    return text


def _windows(found: Explanation) -> list[tuple[int, int]]:
    """[first, end) tokens around every fact, and the question with what stands before it; without facts the contested places."""
    n = sum(piece.n for piece in found.pieces)
    question = next((piece.first for piece in found.pieces if piece.part == "question"), n)
    places = list(found.finding.gold) or [
        (piece.first, piece.first + piece.n) for piece in _most_contested(found.pieces)
    ]
    wanted = sorted([(max(a - AROUND, 0), min(b + AROUND, n)) for a, b in places] + [(max(question - AROUND, 0), n)])
    merged: list[tuple[int, int]] = []
    for a, b in wanted:
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _clipped(piece: Piece, start: int, end: int) -> str:
    """A piece's text; where a window ends inside a long piece, about as much of it as belongs to the window."""
    first, last = max(start - piece.first, 0), min(end - piece.first, piece.n)
    if (first, last) == (0, piece.n):
        return piece.text
    size = len(piece.text)
    return piece.text[size * first // piece.n : size * last // piece.n]


def _style(piece: Piece) -> str:
    style = STYLES[piece.fate]
    if piece.gold:
        style = "bold underline red" if piece.fate == "evicted" else f"bold underline {style}".strip()
    return style


def _most_contested(pieces: Sequence[Piece]) -> list[Piece]:
    some = [piece for piece in pieces if piece.part == "context" and piece.fate != "evicted" and piece.share < 1]
    return sorted(sorted(some, key=lambda piece: abs(piece.share - 0.5))[:CONTESTED], key=lambda piece: piece.first)


def _contested(pieces: Sequence[Piece]) -> Table | None:
    """The boundary: tokens that about half of the heads keep."""
    chosen = _most_contested(pieces)
    if not chosen:
        return None
    table = _table("boundary: the tokens that the heads agree on least", "at", "kept by", "text")
    for row in _contested_rows(chosen):
        table.add_row(*row)
    return table


def _contested_rows(chosen: Sequence[Piece]) -> Iterator[tuple[str, str, Text]]:
    for piece in chosen:
        yield f"{piece.first}", f"{piece.share:.0%}", Text(repr(shorten(piece.text, 60)) if piece.text else DASH)
