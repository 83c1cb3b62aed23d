"""Importing every module of a package, so that what registers itself is found without a list to keep."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvpress.errors import InputError

#: import names of what the extra `eval` installs
EXTRA = frozenset({"jieba", "jinja2", "matplotlib", "nltk", "scipy", "tiktoken"})


@contextmanager
def needs_extra() -> Iterator[None]:
    """Turn a missing library of the extra `eval` into one sentence that says how to get it.

    Raises:
        InputError: a library of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise InputError(
            f"evaluation needs {error.name}: install it with pip install 'kvpress-engine[eval]' (in a clone: '.[eval]')"
        ) from None


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import all modules below a package, packages in it included."""
    for module in pkgutil.walk_packages(path, prefix=f"{package}."):
        with needs_extra():
            importlib.import_module(module.name)
