"""A recipe: from which text a projection is made, how it is trained, and how its ranks are searched. A YAML file in configs/calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kvpress.errors import InputError, unknown
from kvpress.files import read_yaml
from kvpress.matryoshka.init import KINDS
from kvpress.matryoshka.text import Source
from kvpress.matryoshka.train import TrainSettings
from kvpress.slots.base import describe


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Start(_Fields):
    """Where the bases begin. kind: pca, query, planes, dct or random; windows: of text for the moments; window: their tokens, which should be
    the length that will be served."""

    kind: str = "query"
    windows: int = Field(default=32, ge=1)
    window: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(unknown("start of a projection", kind, KINDS))
        return kind


class Search(_Fields):
    """How ranks are searched. shares: of the native bytes; windows, window: of the text that scores, as long as the contexts that will be
    served; step: by which ranks differ, None an eighth; rounds: of an exchange, for each share. generations, children: of an evolution,
    which begins at what `sensitivity` finds."""

    method: Literal["greedy", "sensitivity", "exchange", "evolution"] = "exchange"
    shares: Annotated[tuple[float, ...], Field(min_length=1)] = (0.75, 0.625, 0.5, 0.375, 0.25)
    windows: int = Field(default=2, ge=1)
    window: int = Field(default=2048, ge=2)
    step: int | None = Field(default=None, ge=8)
    rounds: int = Field(default=4, ge=1)
    generations: int = Field(default=20, ge=1)
    children: int = Field(default=16, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)


class Judging(_Fields):
    """How the result is judged: windows of text that nothing else has seen, and the shares at which it is."""

    windows: int = Field(default=16, ge=1)
    window: int = Field(default=2048, ge=2)
    shares: Annotated[tuple[float, ...], Field(min_length=1)] = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)


class Recipe(_Fields):
    """A recipe. text: sources with their licences; means: whether value means are used (not with learned attention sinks)."""

    text: Annotated[tuple[Source, ...], Field(min_length=1)]
    means: bool = True
    start: Start = Start()
    training: TrainSettings = TrainSettings()
    search: Search = Search()
    judging: Judging = Judging()


def recipes_folder() -> Path:
    """The folder of recipes: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs" / "calibration"
    return inside if inside.is_dir() else package.parent / "configs" / "calibration"


def load_recipe(source: str) -> Recipe:
    """A recipe by its name or from a .yaml file.

    Raises:
        InputError: there is none, or a field is missing, unknown or wrong.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(one.stem for one in recipes_folder().glob("*.yaml"))
        if source not in known:
            raise InputError(f"there is no recipe '{source}': give a .yaml file, or one of {', '.join(known)}")
        path = recipes_folder() / f"{source}.yaml"
    fields = read_yaml(path, "recipe")
    if not isinstance(fields, dict):
        raise InputError(f"recipe '{path}' holds no mapping of fields")
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise InputError(f"recipe '{path}': {describe(error, Recipe)}") from None
