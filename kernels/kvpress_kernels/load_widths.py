"""How wide the loads of a compiled kernel are, read from its text, and which of them carry tiles of keys or values.

In Triton's GPU dialect a load of keys or values is a load of a two-dimensional tile inside a loop; whether it became
one 16-byte instruction or eight of 2 bytes only the machine's text says. Both name the line and column of the source
that an instruction comes from, and that is how they are joined here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

#: file, line and column in the source
Place = tuple[str, int, int]

_TILE = re.compile(
    r"(tt\.load|ttg\.async_copy_global_to_local|amdg\.buffer_load\w*) .*"
    r"tensor<(\d+)x(\d+)x(?:!tt\.ptr<)?\w+.*loc\((#loc\d*)\)"
)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1}


def tile_loads(ttgir: str) -> Iterator[tuple[str, str]]:
    """(operation, location) of every load of a two-dimensional tile inside a loop."""
    depth = 0
    loops: list[int] = []  # depths of the loops around a line
    for line in ttgir.splitlines():
        found = _TILE.search(line) if loops else None
        if found and int(found[2]) > 1 and int(found[3]) > 1:
            yield found[1], found[4]
        if "scf.for" in line or "scf.while" in line:
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1]:
            loops.pop()


def tile_bytes(ttgir: str, text: str) -> int | None:
    """Width in bytes of the narrowest instruction that loads a tile inside a loop; None where there is no such load."""
    definitions = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))
    places = {_place(location, definitions) for _, location in tile_loads(ttgir)}
    return min((width for place, width in loads(text) if place in places), default=None)


def most_bytes(text: str) -> int | None:
    """Width of load that moves most bytes of a kernel's text; None for a kernel without loads."""
    counts: Mapping[int, int] = Counter(width for _, width in loads(text))
    return max(counts, key=lambda width: (width * counts[width], width), default=None)


def loads(text: str) -> Iterator[tuple[Place | None, int]]:
    """Place in the source and width in bytes of every load from global memory, of PTX or of AMD's assembly."""
    files = {
        int(number): (second or first).rsplit("/", 1)[-1]
        for number, first, second in re.findall(r'\.file\s+(\d+) "([^"]*)"(?: "([^"]*)")?', text)
    }
    place: Place | None = None
    for line in text.splitlines():
        if found := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", line):
            file, row, column = map(int, found.groups())
            place = (files[file], row, column)
        elif found := re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*(0x[0-9a-f]+|\d+)", line):
            yield place, int(found[1], 0)
        elif found := re.search(r"ld\.global[.:\w]*?(?:\.v(\d))?\.b(\d+)\s", line):
            yield place, int(found[1] or 1) * int(found[2]) // 8
        elif found := re.search(
            rf"\b(?:global|buffer|flat)_load_({'|'.join(_AMD_BYTES)})\b", line.replace("_d16", " ")
        ):
            yield place, _AMD_BYTES[found[1]]


def _place(location: str, definitions: Mapping[str, str]) -> Place | None:
    """Where a location of the dialect points to: through names, and to the callee of an inlined call."""
    for _ in range(len(definitions) + 1):
        text = definitions.get(location, "")
        if found := re.match(r'"([^"]*)":(\d+):(\d+)$', text):
            return found[1].rsplit("/", 1)[-1], int(found[2]), int(found[3])
        inner = re.search(r"#loc\d*", text)  # loc("name"(#loc3)), loc(callsite(#loc3 at #loc9))
        if inner is None:
            return None
        location = inner[0]
    return None
