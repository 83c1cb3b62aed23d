"""The arms of a comparison: contracts at budgets, the full cache beside them, and its repetition for the noise floor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvpress.contract import Contract, resolve
from kvpress.errors import InputError
from kvpress_eval.records import FULL, FULL_REPEAT


@dataclass(frozen=True)
class Arm:
    """One way of answering. contract: None for `full_repeat`, which is transformers' own cache."""

    name: str
    contract: Contract | None

    @property
    def budget(self) -> str | None:
        """The budget as one writes it: "25%", "512tokens" or "20MB"; None for an arm that keeps everything."""
        return None if self.contract is None or self.contract.budget.keeps_everything else self.contract.budget.short


FULL_REPEAT_ARM = Arm(FULL_REPEAT, None)


def make_arms(contracts: Iterable[str | dict[str, Any]], budgets: Iterable[str | float]) -> list[Arm]:
    """The full cache, then every contract at every budget; at its own where no budgets are given.

    Raises:
        ContractError: a contract does not exist or does not fit a budget. InputError: two arms have one name.
    """
    arms = [Arm(FULL, resolve("full"))]
    each: list[str | float | None] = list(budgets) or [None]
    for source in contracts:
        for budget in each:
            contract = resolve(source, budget)
            if contract.budget.keeps_everything and contract.name == FULL:
                continue  # it is there already
            arms.append(Arm(f"{contract.name}@{contract.budget.short}", contract))
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"the sweep has arm '{twice[0]}' twice: give the contracts names of their own")
    return arms
