"""Code completion across files: the next line uses a name that another file of the same package defines."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath

from kvpress_eval.data.standins.sources import Sources
from kvpress_eval.data.standins.standin import Item, Standin
from kvpress_eval.data.standins.stdlib_next import code_lines

_DEFINITION = re.compile(r"^(?:async def|def|class) (\w{5,})", re.MULTILINE)
#: a line that only shares a name with another file, or takes it over
_DECLARES = re.compile(r"\s*(?:async def|def|class|import|from)\b")
#: lines in front of a definition that are shown with it
_LEAD_LINES = 20
_CAVEAT = "the standard library is memorised; the items depend on this Python's version, which the manifest names"


def make(sources: Sources, rng: random.Random, *, words: int) -> Iterator[Item]:
    """Files take turns, each with one line. words: of both files together, half of them for the one that is completed."""
    packages: dict[str, dict[str, str]] = defaultdict(dict)
    for path, text in sources.stdlib.items():
        if "/" in path:
            packages[str(PurePosixPath(path).parent)][path] = text
    tasks = [(path, lines) for files in packages.values() for path, lines in crossing(files).items()]
    while tasks:
        for path, lines in rng.sample(tasks, len(tasks)):
            number, name, other = rng.choice(lines)
            own = sources.stdlib[path].split("\n")
            prefix = own[max(0, number - _fitting(own[:number][::-1], words // 2)) : number]
            context = f"# Path: {other}\n{definition(sources.stdlib[other], name, words // 2)}\n# Path: {path}\n"
            yield Item("".join(f"{line}\n" for line in prefix), context, (own[number],), path, language="python")


def crossing(files: dict[str, str]) -> dict[str, list[tuple[int, str, str]]]:
    """For each file of a package: (line, name, the other file that defines the name) of its lines that use one."""
    owners: dict[str, list[str]] = defaultdict(list)
    for path, text in files.items():
        for name in _DEFINITION.findall(text):
            owners[name].append(path)
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    for path, text in files.items():
        lines = text.split("\n")
        for number in code_lines(text):
            used = [name for name in re.findall(r"\w+", lines[number]) if len(owners.get(name, [])) == 1]
            used = [name for name in used if owners[name] != [path]]
            if used and number >= 20 and not _DECLARES.match(lines[number]):
                found[path].append((number, used[0], owners[used[0]][0]))
    return found


def definition(text: str, name: str, words: int) -> str:
    """A stretch of a file with the definition of a name in it."""
    lines = text.split("\n")
    start = next(i for i, line in enumerate(lines) if (m := _DEFINITION.match(line)) and m[1] == name)
    first = max(0, start - _LEAD_LINES)
    return "\n".join(lines[first : first + max(_fitting(lines[first:], words), start - first + 1)])


def _fitting(lines: list[str], words: int) -> int:
    """How many of the lines, from the first on, have no more than so many words together."""
    for count, line in enumerate(lines):
        words -= len(line.split())
        if words < 0:
            return count
    return len(lines)


STANDINS = (
    Standin("standin_repo_xfile", "repobench-p", ("stdlib",), partial(make, words=2400), _CAVEAT),
    Standin("standin_repo_xfile_400", "repobench-p", ("stdlib",), partial(make, words=400), _CAVEAT),
)
