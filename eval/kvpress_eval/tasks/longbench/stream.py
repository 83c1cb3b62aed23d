"""Reading a large JSON array item by item, so that a file of half a gigabyte needs the memory of its longest item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpress.errors import InputError

_CHUNK = 4 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


def stream_array(path: Path, *, max_characters: int) -> Iterator[Any]:
    """The items of the array that a file holds: objects, arrays or strings, whose end shows without what follows.

    max_characters: of one item.

    Raises:
        InputError: the file is no JSON array, ends too early, or has a longer item.
    """
    decoder = json.JSONDecoder()
    index, ended = 0, False
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_CHUNK)
            position = _behind_space(text, 0)
            if not text.startswith("[", position):
                raise InputError(f"'{path}' is no JSON array")
            position = _behind_space(text, position + 1)
            while not text.startswith("]", position):
                try:
                    item, end = decoder.raw_decode(text, position)
                    end = _behind_space(text, end)
                except json.JSONDecodeError:
                    end = len(text)
                if end == len(text):  # the item, or what separates it from the next one, may not be read to its end
                    if ended or end - position > max_characters:
                        raise InputError(
                            f"item {index} of '{path}' is broken or longer than {max_characters:,} characters"
                        )
                    # as much again: a long item is then parsed a few times, not hundreds of times
                    more = file.read(max(_CHUNK, end - position))
                    text, ended = text[position:] + more, not more
                    position = _behind_space(text, 0)
                    continue
                yield item
                if text[end] not in ",]":
                    raise InputError(f"'{path}' has no comma behind item {index}")
                position = _behind_space(text, end + (text[end] == ","))
                index += 1
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"'{path}' is no readable JSON ({type(error).__name__})") from None


def _behind_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position
