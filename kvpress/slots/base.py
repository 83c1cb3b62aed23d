"""The registry that turns `{kind: ..., ...}` into one frozen choice of a slot.

A slot is a question that every selector answers (docs/contracts.md lists them); a choice is one answer.
A new method from a paper is one subclass of its slot's base class with a `kind`:

    class MyRanking(Ranking, kind="my_ranking"):
        source: ClassVar[str] = "arXiv 2601.00001, eq. 4"
"""

from __future__ import annotations

import reprlib
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer

from kvpress.errors import ContractError, unknown

#: values in error messages are cut short: YAML aliases can make a small file hold a value of any size
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


class Choice(BaseModel):
    """Base of all choices: immutable, no unknown fields, `kind` names it within its slot."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    slot: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    source: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[Choice]]]

    def __init_subclass__(cls, *, slot: str = "", kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if slot:
            cls.slot, cls.registry = slot, {}
        if kind:
            cls.kind = kind
            cls.registry[kind] = cls

    @model_serializer
    def _serialize(self) -> dict[str, Any]:
        return {"kind": self.kind, **{name: _plain(getattr(self, name)) for name in type(self).model_fields}}

    def identity(self) -> dict[str, Any]:
        """What makes this choice the one it is, as JSON-able values; it enters a contract's id.

        Fields that are None are left out: a field that is added with the default None changes no id of before.
        """
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Build the choice that `value` (a choice of this slot, a kind, or a mapping with `kind`) describes.

        Raises:
            ContractError: the kind is not registered in this slot, or one of its fields is wrong.
        """
        if isinstance(value, cls):
            return value
        fields = {"kind": value} if isinstance(value, str) else value
        if not isinstance(fields, dict) or not isinstance(fields.get("kind"), str):
            raise ContractError(
                f"slot '{cls.slot}' needs a mapping with 'kind', got {_short.repr(value)}; "
                f"known kinds are {', '.join(sorted(cls.registry))}"
            )
        fields = dict(fields)
        kind = fields.pop("kind")
        choice = cls.registry.get(kind)
        if choice is None:
            raise ContractError(unknown(f"choice of slot '{cls.slot}'", kind, cls.registry))
        try:
            return choice(**fields)  # type: ignore[return-value]
        except ValidationError as error:
            raise ContractError(f"slot '{cls.slot}', choice '{kind}': {describe(error, choice)}") from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error as one clause, with the nearest field name for an unknown one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown("field", where, model.model_fields)
    message = problem["msg"].removeprefix("Value error, ")
    return f"field '{where}': {message} (got {_short.repr(problem['input'])})" if where else message


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and JSON need no tags."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
