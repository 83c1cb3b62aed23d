"""Offline stand-ins for LongBench's families, built from real text: `kvpress data build standins`.

They are named `standin_*` and are never LongBench: other items, other sources, its prompts and metrics. A name that ends in
a number of words (`_1k`, `_400`) is the same set at that size. There is none for summarisation: no data set of long
documents with human summaries is to be had from the packages that these are built from.
"""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import kvpress
from kvpress.errors import InputError
from kvpress_eval.data.files import Data
from kvpress_eval.data.manifest import write_file
from kvpress_eval.data.standins import (
    debsection,
    factbook_kv,
    hotpot_docs,
    passages,
    repo_xfile,
    squad_article,
    squad_fewshot,
    stdlib_next,
)
from kvpress_eval.data.standins.sources import GET, Sources
from kvpress_eval.data.standins.standin import Item, Standin, cluster_of, to_row

__all__ = ["BUILD", "STANDINS", "Item", "Standin", "build_standins", "cluster_of"]

#: what gets a missing file
BUILD = f"{GET} && kvpress data build standins"
STANDINS: tuple[Standin, ...] = (
    *squad_article.STANDINS,
    *hotpot_docs.STANDINS,
    *squad_fewshot.STANDINS,
    *debsection.STANDINS,
    *passages.STANDINS,
    *factbook_kv.STANDINS,
    *stdlib_next.STANDINS,
    *repo_xfile.STANDINS,
)


def build_standins(folder: Path, data: Data, *, seed: int = 0, items: int = 200) -> Path:
    """Write `standins/<name>.jsonl` for every stand-in, and a MANIFEST.json that says what they are made of.

    The same sources and seed give the same bytes. A set whose source is found on some systems only is left out elsewhere,
    and the manifest says so.

    Args:
        folder: the files go to `<folder>/standins`.
        data: where the sources are.
        items: of each set.

    Returns:
        The folder with the files.

    Raises:
        InputError: a source is missing or not the one these sets were checked with.
    """
    sources = Sources(data)
    target = folder / "standins"
    entries: dict[str, Any] = {}
    for standin in STANDINS:
        try:
            entries[standin.name] = _build(standin, sources, target, seed, items)
        except InputError as error:
            if not standin.optional:
                raise
            entries[standin.name] = {"left_out": str(error)}
    manifest = {"builder": f"kvpress {kvpress.__version__}", "seed": seed, "sets": entries}
    content = json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n"
    write_file(target / "MANIFEST.json", content, expected=None, source="stand-ins")
    return target


def _build(standin: Standin, sources: Sources, target: Path, seed: int, items: int) -> dict[str, Any]:
    """Write one set and say what it is."""
    # sizes of one set share what they draw first
    rng = random.Random(f"{standin.like}:{'+'.join(standin.sources)}:{seed}")
    made = list(islice(standin.make(sources, rng), items))
    digests = {source: sources.digests[source] for source in standin.sources}
    sha256 = "+".join(digests.values())
    rows = [to_row(standin, item, source_sha256=sha256, index=i, seed=seed) for i, item in enumerate(made)]
    content = "".join(f"{row}\n" for row in rows).encode()
    return {
        "sha256": write_file(target / f"{standin.name}.jsonl", content, expected=None, source="stand-ins"),
        "items": len(made),
        "clusters": len({item.cluster for item in made}),
        "prompt_and_metric_of": standin.like,
        "sources": [
            dict(zip(("package", "version", "licence"), Sources.ORIGINS[source], strict=True), sha256=digest)
            for source, digest in digests.items()
        ],
        "caveat": standin.caveat,
    }
