"""Structured retrieval: one field of one country, out of the World Factbook's fields of several countries."""

from __future__ import annotations

import html
import random
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from kvpress_eval.data.standins.sources import Sources
from kvpress_eval.data.standins.standin import Item, Standin

N_COUNTRIES = 5
#: words of a field that is shown, and of one that is asked for
_LONGEST_SHOWN, _LONGEST_ASKED = 40, 10
_CAVEAT = "the facts are those of one edition, and a model may know them: the answer is what the context says"


def make(sources: Sources, rng: random.Random, *, words: int) -> Iterator[Item]:
    """Countries take turns; the other four are drawn. words: of the context."""
    countries = {}
    for country in sources.factbook:
        name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text", "")
        found = fields(country)
        if re.fullmatch(r"[A-Z][A-Za-z ]+", name) and name != "none" and len(found) >= 20:
            countries[name] = found
    names = rng.sample(sorted(countries), len(countries))
    while names:
        for name in names:
            others = rng.sample([other for other in names if other != name], min(N_COUNTRIES, len(names)) - 1)
            shown = rng.sample([name, *others], len(others) + 1)
            chosen = {other: choose(countries[other], words // len(shown), rng) for other in shown}
            asked = [field for field in chosen[name] if askable(field, name, chosen)]
            if asked:
                field = rng.choice(asked)
                text = "\n\n".join(
                    "\n".join([f"Country: {other}", *(f"{key}: {value}" for key, value in chosen[other].items())])
                    for other in shown
                )
                yield Item(f'What is given as "{field}" for {name}?', text, (chosen[name][field],), cluster=name)


def fields(country: dict[str, Any]) -> dict[str, str]:
    """Short fields of a country, by their names below the section, joined by " - "; a name that comes twice is left out."""
    found: dict[str, list[str]] = {}

    def walk(node: dict[str, Any], path: tuple[str, ...]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                text = value.get("text")
                if isinstance(text, str) and 0 < len(plain(text).split()) <= _LONGEST_SHOWN:
                    found.setdefault(" - ".join((*path, key.strip())), []).append(plain(text))
                walk(value, (*path, key.strip()))

    for section in country.values():
        walk(section, ())
    return {key: values[0] for key, values in found.items() if len(values) == 1}


def plain(text: str) -> str:
    """Text without markup, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def choose(country: dict[str, str], words: int, rng: random.Random) -> dict[str, str]:
    """Fields drawn until there is no room for the next one, in their own order."""
    chosen: set[str] = set()
    left = words - 2
    for key in rng.sample(list(country), len(country)):
        needed = len(f"{key}: {country[key]}".split())
        if needed > left:
            break
        chosen.add(key)
        left -= needed
    return {key: value for key, value in country.items() if key in chosen}


def askable(field: str, name: str, chosen: dict[str, dict[str, str]]) -> bool:
    """Whether the answer is short, is no part of another field that is shown, and says something."""
    answer = chosen[name][field]
    if len(answer.split()) > _LONGEST_ASKED or len(answer) < 4 or not re.search(r"\w", answer):
        return False
    values = [value for country in chosen.values() for value in country.values()]
    return sum(answer in value for value in values) == 1


STANDINS = (
    Standin("standin_factbook_kv", "multifieldqa_en", ("factbook",), partial(make, words=4000), _CAVEAT),
    Standin("standin_factbook_kv_1k", "multifieldqa_en", ("factbook",), partial(make, words=1000), _CAVEAT),
)
