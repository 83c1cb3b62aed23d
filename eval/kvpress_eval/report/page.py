"""What every page is made with: a template that escapes all texts, one style, one script, and the policy that names its hash."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any


def render(package: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page of a package's `page.html.j2`.

    package: dotted name of the folder with the template; its own `page.css`, where it has one, comes behind the shared style.
    filters: of the template. values: what it shows; `style`, `script` and `script_hash` are added.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    parent, _, folder = package.rpartition(".")
    environment = Environment(
        loader=PackageLoader(parent, folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    shared = __name__.rpartition(".")[0]
    script = _read(shared, "page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        style="\n".join(_read(place, "page.css") for place in dict.fromkeys((shared, package))),
        script=script,
        script_hash=f"sha256-{digest}",
        **values,
    )


def _read(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")
