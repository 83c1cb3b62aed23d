"""Small files in LongBench's official schema, and the samples that its tasks make of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvpress_eval.data import Data
from kvpress_eval.sample import Sample
from kvpress_eval.tasks import TASKS, Request

ANSWERS = {
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 3",
    "passage_retrieval_zh": "段落3",
    "multifieldqa_zh": "清华大学",
    "dureader": "在北京。",
    "vcsum": "会议讨论了预算。",
    "trec": "Date",
    "lsht": "体育",
}
CONTEXT = "A text with {braces}, {context} and {input}.\nThe tower of Paris is 330 m high."
QUERY = "Where {is} {context} the tower? %s $Q$"


def row(name: str, index: int = 0, **changes: Any) -> dict[str, Any]:
    content = {
        "input": QUERY,
        "context": CONTEXT,
        "answers": [ANSWERS.get(name, "the tower of Paris")],
        "length": 3500 + 4000 * index,
        "dataset": name,
        "language": "en",
        "all_classes": ["Date", "体育", "City"] if name in ("trec", "lsht") else None,
        "_id": hashlib.sha256(f"{name} {index}".encode()).hexdigest()[:48],
    }
    return content | changes


def write(path: Path, *contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(content, ensure_ascii=False) + "\n" for content in contents), encoding="utf-8")


def samples(folder: Path, task: str, limit: int | None = None) -> list[Sample]:
    # the tokenizer plays no part: segments are delivered as text
    return list(TASKS[task].samples(Request(None, Data([folder]), limit=limit)))  # type: ignore[arg-type]


def write_trees(folder: Path, n_rows: int) -> None:
    """A set of short contexts about trees, for tests that start processes: multifieldqa_en with `n_rows` rows."""
    woods = ["birch", "oak", "pine", "elm"]
    rows = [
        {
            "input": f"Which tree is number {i}?",
            "context": " ".join(f"Tree {k} is a {woods[(i + k) % 4]}." for k in range(20)),
            "answers": ["birch"],
            "length": 100,
            "dataset": "multifieldqa_en",
            "language": "en",
            "all_classes": None,
            "_id": f"{i:048x}",
        }
        for i in range(n_rows)
    ]
    (folder / "longbench").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "longbench" / "multifieldqa_en.jsonl").write_text(text, encoding="utf-8")
