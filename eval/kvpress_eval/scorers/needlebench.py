"""NeedleBench's metrics: keywords of the needles in the prediction, and boxed answers.

Source: open-compass/opencompass a5acc4b, opencompass/datasets/needlebench{,_v2}/{origin,parallel}.py,
needlebench_v2/atc_elder_only.py and datasets/math.py. All keyword tests are case-sensitive.
"""

from __future__ import annotations

import re

from kvpress_eval.sample import Sample
from kvpress_eval.scorers.alignment import levenshtein
from kvpress_eval.scorers.base import Score, scorer

_BOX = r"\boxed{"


@scorer("needle_keyword", version="needlebench-v2")
def needle_keyword(prediction: str, sample: Sample) -> Score:
    """S-RT: 1 if the prediction contains the needle's keyword, `sample.answers[0]`, else 0."""
    return Score(float(sample.answers[0] in prediction))


@scorer("needle_keyword_v1", version="needlebench-v1")
def needle_keyword_v1(prediction: str, sample: Sample) -> Score:
    """S-RT of version 1: as `needle_keyword`, but a wrong answer that resembles the needle, `sample.evidence[0]`, earns
    up to 0.2: 0.2 (1 - Levenshtein distance / longer length), whitespace left out.
    """
    if sample.answers[0] in prediction:
        return Score(1.0)
    guess, needle = "".join(prediction.split()), "".join(sample.evidence[0].split())
    return Score(0.2 * (1 - levenshtein(guess, needle) / max(len(guess), len(needle))))


@scorer("needle_parallel", version="needlebench-v2")
def needle_parallel(prediction: str, sample: Sample) -> Score:
    """M-RT: mean over the needles of [keyword in the prediction].

    `sample.answers` are the keywords and `sample.meta["depths"]` their depths in percent, in the same order; the
    parts are named "depth 0" and so on.
    """
    depths = sample.meta["depths"]
    parts = {
        f"depth {depth}": float(keyword in prediction) for keyword, depth in zip(sample.answers, depths, strict=True)
    }
    return Score(sum(parts.values()) / len(parts), parts)


@scorer("boxed", version="needlebench-v2")
def boxed(prediction: str, sample: Sample) -> Score:
    r"""M-RS and ATC: 1 if the content of the last `\boxed{}`, cleaned, is exactly the reference, else 0."""
    content = last_box(prediction)
    return Score(float(content is not None and clean_box(content).strip() == sample.answers[0].strip()))


def last_box(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces, without a second pair of braces around it.

    None if there is none, or the last one is never closed or not followed by a brace: an earlier box does not count
    then.
    """
    start = text.rfind(r"\boxed")
    if start < 0 or not text.startswith(_BOX, start):
        return None
    depth = 0
    for position in range(start + len(_BOX) - 1, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            content = text[start + len(_BOX) : position]
            inner = re.match(r"\{(.*)\}$", content)
            return inner[1] if inner else content
    return None


def clean_box(content: str) -> str:
    r"""`\text{}` and a nested `\boxed{}` unwrapped, `\[`, `\]`, backslashes and quotes left out, spaces collapsed."""
    for command in ("text", "boxed"):
        content = re.sub(rf"\\{command}\{{([^}}]+)\}}", r"\1", content)
    content = re.sub(r"\\[\[\]]", "", content).replace("\\", "")
    content = " ".join(content.split())
    return content.replace('"', "").replace("'", "").replace("~", " ")
