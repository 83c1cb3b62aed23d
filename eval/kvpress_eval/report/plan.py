"""What a manifest says of the plan: margins, numbers of samples, the run that records belong to.

A manifest may have been edited or made elsewhere, so nothing in it is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvpress.errors import InputError
from kvpress_eval.records import Record

MARGINS = {"task": 0.03, "macro": 0.01}


def margins(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The margins, as shares of the score; `MARGINS` where the manifest has none.

    Raises:
        InputError: one of them is no number between 0 and 1.
    """
    given = manifest.get("margins", {})
    if not isinstance(given, Mapping):
        raise InputError(f"'margins' of the manifest is {given!r}; it must be a mapping such as {MARGINS}")
    found = {name: given.get(name, default) for name, default in MARGINS.items()}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(
                f"the margin '{name}' of the manifest is {value!r}; it must be a share of the score between 0 and 1, such "
                f"as {MARGINS[name]}"
            )
    return found


def task_facts(manifest: Mapping[str, Any], task: str, length: int | None) -> Mapping[str, Any]:
    """What the manifest says of a task at a length: "n" samples, "official" ones, "caveat". Empty where it says nothing."""
    entries = manifest.get("tasks")
    found = entries.get(_key(task, length)) if isinstance(entries, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def n_samples(manifest: Mapping[str, Any], task: str, length: int | None, what: str = "n") -> int | None:
    """The number of samples that were planned, or with "official" of the published set; None where it is not given.

    Raises:
        InputError: it is no number of samples.
    """
    n = task_facts(manifest, task, length).get(what)
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
        raise InputError(
            f"'{what}' of the task '{_key(task, length)}' in the manifest is {n!r}; it must be a number of samples, 0 or more"
        )
    return n


def differs_from_published(manifest: Mapping[str, Any], family: str, task: str, length: int | None) -> str | None:
    """A sentence if all samples were asked for and these are not as many as were published."""
    n, official = (n_samples(manifest, task, length, what) for what in ("n", "official"))
    if n is None or official is None or n == official or _limited(manifest, family, task, length):
        return None
    return f"{_key(task, length)}: {n:,} samples, the published set has {official:,}"


def check_one_run(records: Iterable[Record], manifest: Mapping[str, Any]) -> None:
    """Raise InputError if the records are not all of one run, that of the manifest."""
    named = {record.run for record in records}
    own = manifest.get("run")
    if len(named) > 1 or (own is not None and named != {own}):
        shown = ", ".join(repr(name) for name in sorted(named)[:4])
        raise InputError(
            f"records of another run lie in the folder: the records name the runs {shown}, the manifest {own!r}; keep the "
            "records of one run in a folder"
        )


def _key(task: str, length: int | None) -> str:
    return task if length is None else f"{task}@{length}"


def _limited(manifest: Mapping[str, Any], family: str, task: str, length: int | None) -> bool:
    """Whether the sweep asked for a part of the samples; a manifest without a sweep does not say, so it may have."""
    sweep = manifest.get("sweep")
    if not isinstance(sweep, Mapping) or sweep.get("limit") is not None:
        return True
    choices = sweep.get("tasks")
    return any(
        isinstance(choice, Mapping)
        and choice.get("task") in (family, task)
        and choice.get("length") in (None, length)
        and choice.get("limit") is not None
        for choice in (choices if isinstance(choices, list) else [])
    )
