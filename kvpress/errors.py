"""Errors that a user can act on: one sentence that says what was wrong, where, and what would work.

The command line prints the sentence and exits with code 2; a library user catches `KvpressError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvpressError(Exception):
    """Base of every error that this package raises on purpose."""


class ContractError(KvpressError):
    """A contract that cannot be built, read or applied."""


class UnsupportedModelError(KvpressError):
    """A model, or a feature of a model, that the compressed cache does not serve."""


class InputError(KvpressError):
    """A wrong file, prompt, option or call."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not in `known`, with the nearest known name."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown {what} '{name}': {hint}known are {', '.join(names)}"
