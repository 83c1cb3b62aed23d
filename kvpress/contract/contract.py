"""A contract: one choice for each of the ten slots. Frozen, checked when it is built, with an id of its content.

contract = Contract.load("snapkv").swap(ranking={"kind": "mii"})
differences(Contract.load("snapkv"), contract)        # ["ranking"]
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, field_validator, model_validator

from kvpress.contract.combinations import check_combination
from kvpress.errors import ContractError, unknown
from kvpress.slots import (
    Access,
    Allocation,
    Budget,
    Choice,
    Granularity,
    Protection,
    QueryLaw,
    Ranking,
    Representation,
    Retention,
    Schedule,
)
from kvpress.slots.base import describe

#: slot name -> base class, in the order in which contracts are written
SLOTS: dict[str, type[Choice]] = {
    "budget": Budget,
    "granularity": Granularity,
    "query_law": QueryLaw,
    "access": Access,
    "ranking": Ranking,
    "allocation": Allocation,
    "retention": Retention,
    "protection": Protection,
    "representation": Representation,
    "schedule": Schedule,
}


class Contract(BaseModel):
    """One choice per slot. `name` and `description` are labels; they do not enter the id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    description: str = ""
    budget: SerializeAsAny[Budget] = Budget.parse({"kind": "fraction", "value": 0.25})
    granularity: SerializeAsAny[Granularity] = Granularity.parse("token")
    query_law: SerializeAsAny[QueryLaw] = QueryLaw.parse("tail")
    access: SerializeAsAny[Access] = Access.parse("aggregate")
    ranking: SerializeAsAny[Ranking] = Ranking.parse("mass")
    allocation: SerializeAsAny[Allocation] = Allocation.parse("uniform")
    retention: SerializeAsAny[Retention] = Retention.parse("top_k")
    protection: SerializeAsAny[Protection] = Protection.parse("standard")
    representation: SerializeAsAny[Representation] = Representation.parse("model")
    schedule: SerializeAsAny[Schedule] = Schedule.parse("end_of_prefill")

    @field_validator(*SLOTS, mode="before")
    @classmethod
    def _parse_choice(cls, value: Any, info: Any) -> Choice:
        return SLOTS[info.field_name].parse(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_combination(self)
        return self

    @classmethod
    def build(cls, fields: Any) -> Contract:
        """A contract from a mapping of slots to choices; slots that are left out take their default.

        Raises:
            ContractError: an unknown slot, choice or field (with the nearest name), or an impossible combination.
        """
        if not isinstance(fields, dict):
            raise ContractError(f"a contract is a mapping of slots to choices, got {type(fields).__name__}")
        for key in fields:
            if key not in cls.model_fields:
                raise ContractError(unknown("slot", str(key), SLOTS))
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ContractError(f"contract: {describe(error, cls)}") from None

    @classmethod
    def load(cls, source: Any, budget: Any = None) -> Contract:
        """See `kvpress.contract.resolve`."""
        from kvpress.contract.presets import resolve

        return resolve(source, budget)

    def swap(self, **slots: Any) -> Contract:
        """A contract with other choices in the named slots, checked like a new one."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return self.build({**fields, **slots})

    @property
    def choices(self) -> dict[str, Choice]:
        """slot -> choice, in the order of SLOTS."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    def canonical_json(self) -> str:
        """The ten slots as JSON with sorted keys and no spaces: equal contracts give equal text."""
        slots = {slot: choice.identity() for slot, choice in self.choices.items()}
        return json.dumps(slots, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @property
    def id(self) -> str:
        """sha256 of `canonical_json`, in hex."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def to_yaml(self) -> str:
        """The contract as YAML that `resolve` reads back to an equal contract."""
        fields = {"name": self.name, "description": self.description}
        slots = {slot: choice.model_dump(mode="json") for slot, choice in self.choices.items()}
        return yaml.safe_dump({**fields, **slots}, sort_keys=False, default_flow_style=None, width=100)

    @classmethod
    def from_yaml(cls, path: Any) -> Contract:
        """Read a contract from a YAML file."""
        from kvpress.contract.presets import read_yaml

        return read_yaml(path)


def differences(a: Contract, b: Contract) -> list[str]:
    """Names of the slots in which two contracts differ; exactly one makes a diagnostic pair, more a transfer."""
    return [slot for slot in SLOTS if getattr(a, slot) != getattr(b, slot)]
