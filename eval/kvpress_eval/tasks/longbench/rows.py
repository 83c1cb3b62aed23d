"""Rows of LongBench v1: one line of JSON each, from `<name>.jsonl` or from the member `data/<name>.jsonl` of data.zip."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvpress.errors import InputError
from kvpress_eval.data import Data

GET = "kvpress data fetch longbench"
#: the longest context of the benchmark has about 0.5 MB, the largest file about 25 MB
MAX_ROW_BYTES, MAX_FILE_BYTES = 16 * 2**20, 2**30


class Row(BaseModel):
    """The official schema. length: words (Chinese: characters) as the benchmark counts them; input: question or query."""

    model_config = ConfigDict(frozen=True, strict=True)
    id: str = Field(alias="_id", min_length=1, max_length=200)
    dataset: str
    language: str
    input: str
    context: str
    answers: tuple[Annotated[str, Field(max_length=200_000)], ...] = Field(min_length=1, max_length=1000)
    all_classes: tuple[str, ...] | None = Field(max_length=10_000)
    length: int = Field(ge=0)


def read_rows(data: Data, name: str) -> Iterator[Row]:
    """The rows of a set, in the order of its file.

    Args:
        data: its folders may hold `longbench/data.zip` or `longbench/<name>.jsonl`, or the same without `longbench/`.
        name: of the set, with `_e` for the E split.

    Raises:
        InputError: there is no such file, it is no LongBench file, or a row has not the official fields.
    """
    member = f"data/{name}.jsonl"
    names = [f"{name}.jsonl", member, "data.zip"]
    path = data.first([*(f"longbench/{candidate}" for candidate in names), *names], get=GET)
    with _opened(path, member) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"'{path}' {member if path.suffix == '.zip' else ''}".rstrip() + f" line {number}"
            if len(line) > MAX_ROW_BYTES:
                raise InputError(f"{where} is longer than {MAX_ROW_BYTES:,} bytes: no row of LongBench is")
            if line.strip():
                yield _row(line, name.removesuffix("_e"), where)


def _row(line: bytes, dataset: str, where: str) -> Row:
    try:
        row = Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"field {'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise InputError(f"{where} is no row of LongBench ({field}{first['msg']}): get the file with `{GET}`") from None
    if row.dataset.removesuffix("_e") != dataset:
        raise InputError(
            f"{where} has '{row.dataset}' in the field dataset, not '{dataset}': other data must not be reported as "
            f"LongBench, give it a task of its own"
        )
    return row


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes]]:
    """The bytes of a jsonl file, be it in an archive."""
    if path.suffix != ".zip":
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo(member).file_size > MAX_FILE_BYTES:
                raise InputError(
                    f"{member} in '{path}' is larger than {MAX_FILE_BYTES:,} bytes: no file of LongBench is"
                )
            with archive.open(member) as file:
                yield file
    except KeyError:
        raise InputError(f"'{path}' has no {member}: get LongBench's archive with `{GET}`") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # RuntimeError: an encrypted member; NotImplementedError: an unknown compression
        raise InputError(f"'{path}' cannot be unpacked ({error}): get LongBench's archive with `{GET}`") from None
