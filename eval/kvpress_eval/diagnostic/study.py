"""A study: a sweep whose arms are swaps of one slot of a host, each of which belongs to one stage.

host: snapkv
swaps:
  debiased: {base: cumulative, swap: {access: {kind: aggregate, debias: true}}}
  mii: {swap: {ranking: mii}}
  blocks: {transfer: fit, swap: {granularity: {kind: block, size: 16}, retention: strict_blocks}}

An arm that differs from its base in one slot is a diagnostic: what its score does has one cause. One that differs in more is a
transfer, must say so, and is called so wherever it is shown (arXiv 2605.08234 section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from kvpress.contract import Contract, differences, resolve
from kvpress.errors import ContractError
from kvpress.files import read_yaml
from kvpress_eval.arms import Arm, make_arms
from kvpress_eval.diagnostic.coupling import task_coupling
from kvpress_eval.diagnostic.finding import Stage
from kvpress_eval.records import FULL, FULL_REPEAT
from kvpress_eval.sweep import Sweep, _Fields, sweeps_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvpress_eval.engine import Engine
    from kvpress_eval.units import Item

#: the stage that each slot belongs to (arXiv 2605.08234 Fig. 1). The paper has no representation; it changes what a kept token gives
STAGE_OF_SLOT: dict[str, Stage] = {
    "query_law": "access",
    "access": "access",
    "schedule": "access",
    "ranking": "value",
    "representation": "value",
    "granularity": "fit",
    "allocation": "fit",
    "retention": "fit",
    "protection": "fit",
}
NULL, ORACLE = "null", "oracle"
Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")]


class Swap(_Fields):
    """One arm. swap: slots and their new choices, in the contract of `base` (the host, or another arm); or contract: a whole
    contract. transfer: the stage under which an arm with several differences is shown; not allowed for one difference."""

    base: str | None = None
    swap: dict[str, Any] | None = None
    contract: str | dict[str, Any] | None = None
    transfer: Stage | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.swap is None) == (self.contract is None):
            raise ValueError("an arm needs either 'swap' or 'contract'")
        return self


class Failing(_Fields):
    """Which answers are looked into: the full cache scores at least `full`, and the arm loses at least the share `lost` of that.

    Half and half by default: for right-or-wrong items that is "the full cache is right and the arm is wrong".
    """

    full: float = Field(default=0.5, gt=0, le=1)
    lost: float = Field(default=0.5, gt=0, le=1)

    def fails(self, full: float, arm: float) -> bool:
        return full >= self.full and full - arm >= self.lost * full - 1e-12


class Measuring(_Fields):
    """What is measured beside the scores.

    max_reference: tokens of the reference answer that are read; longer ones are cut. attribute: arms whose failures are replayed; None for
        all, () for none. answer_slack: tokens by which a replay's text may be longer than the reference. rows: of one batch of replays.
    controls: random exchanges that a replay that repairs is held against.
    boundary: share of the samples, drawn by their prompt's digest, on which rankings are compared at the host's boundary. draws: exchanges at
        random for each ranking. units, width: how many units are left out of the full cache one at a time, and their tokens.
    """

    max_reference: int = Field(default=64, ge=2)
    attribute: tuple[str, ...] | None = None
    failing: Failing = Failing()
    answer_slack: int = Field(default=16, ge=0)
    rows: int = Field(default=32, ge=1)
    controls: int = Field(default=3, ge=1)
    boundary: float = Field(default=0.5, ge=0, le=1)
    draws: int = Field(default=2, ge=1)
    units: int = Field(default=16, ge=4)
    width: int = Field(default=8, ge=1)


@dataclass(frozen=True)
class Comparison:
    """An arm and what it is compared with, both without budget. slots: in which they differ; one makes a diagnostic."""

    arm: str
    base: str
    stage: Stage
    slots: tuple[str, ...]
    role: Literal["arm", "null", "oracle"] = "arm"

    @property
    def is_diagnostic(self) -> bool:
        return len(self.slots) == 1

    @property
    def label(self) -> str:
        """ "diagnostic" or "transfer"."""
        return "diagnostic" if self.is_diagnostic else "transfer"


class Study(Sweep):
    """A sweep with a host.

    swaps: the arms, in the order in which they are shown; or the name of a set of them (`configs/swaps`), or a .yaml file with one. Beside
        them run the host, the null arm (the host's ranking with negligible noise) and the oracle arm (the host with the queries of a right answer).
    """

    command: ClassVar[str] = "diagnose"
    host: str | dict[str, Any]
    swaps: dict[Name, Swap] = Field(default_factory=dict)
    budgets: Annotated[tuple[str | float | int, ...], Field(min_length=1)]
    measure: Measuring = Measuring()
    _contracts: dict[str, Contract] = PrivateAttr(default_factory=dict)
    _comparisons: tuple[Comparison, ...] = PrivateAttr(default=())

    @field_validator("swaps", mode="before")
    @classmethod
    def _named_swaps(cls, value: Any) -> Any:
        return load_swaps(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _build(self) -> Self:
        if self.contracts:
            raise ValueError("a study names its arms under 'swaps', not under 'contracts'")
        try:
            host = resolve(self.host)
            budgets = [resolve(host, budget).budget for budget in self.budgets]
            if host.name in (FULL, FULL_REPEAT) or any(budget.keeps_everything for budget in budgets):
                raise ValueError(
                    "the host must evict something at every budget, and not be called 'full' or 'full_repeat'"
                )
            if len({budget.short for budget in budgets}) < len(budgets):
                raise ValueError("a budget is given twice")
            found, comparisons = {host.name: host}, []
            swaps = [*self.swaps.items(), (NULL, _null(host)), (ORACLE, _oracle(host))]
            for name, swap in swaps:
                if name in (*found, FULL):
                    raise ValueError(
                        f"arm '{name}' is there twice: the host has that name, or it is one of {FULL}, {NULL} and {ORACLE}"
                    )
                base = host.name if swap.base is None else swap.base
                if base not in found:
                    raise ValueError(f"arm '{name}' is based on '{base}', which is not the host or an arm before it")
                found[name] = _contract(name, swap, found[base])
                comparisons.append(_compare(name, base, swap, found))
            attribute = self.measure.attribute or ()
            unknown = [name for name in attribute if name not in found]
            if unknown:
                raise ValueError(f"measure.attribute names '{unknown[0]}', which is no arm of this study")
        except ContractError as error:
            raise ValueError(str(error)) from None
        self._contracts, self._comparisons = found, tuple(comparisons)
        return self

    @property
    def host_name(self) -> str:
        return next(iter(self._contracts))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every arm with its base, in order; null and oracle at the end."""
        return self._comparisons

    def contract(self, name: str) -> Contract:
        """The contract of an arm, at its own budget."""
        return self._contracts[name]

    def arms(self) -> list[Arm]:
        arms = make_arms([], [])
        for name, contract in self._contracts.items():
            for budget in self.budgets:
                at = resolve(contract, budget)
                arms.append(Arm(f"{name}@{at.budget.short}", at))
        return arms

    def notes(self, task: str, items: Sequence[Item]) -> dict[str, dict[str, Any]]:
        """The task's support coupling, fixed before its first answer."""
        return {"coupling": {task: task_coupling([item.sample.context for item in items])}}

    def engine(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arms: Sequence[Arm]) -> Engine:
        from kvpress_eval.diagnostic.examiner import Examiner

        return Examiner(
            model,
            tokenizer,
            arms,
            self.measure,
            self.host_name,
            backend=self.backend,
            chunk=self.prefill_chunk,
            batch=self.batch_arms,
        )


def swaps_folder() -> Path:
    """The folder of the sets of swaps that come with the package."""
    return sweeps_folder().parent / "swaps"


def load_swaps(source: str) -> dict[str, Any]:
    """A set of swaps by its name, or from a .yaml file.

    Raises:
        ValueError: there is none, or it is no mapping.
    """
    known = {path.stem: path for path in sorted(swaps_folder().glob("*.yaml"))}
    path = known.get(source, Path(source))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ValueError(
            f"there is no set of swaps '{source}': give a mapping, a .yaml file, or one of {', '.join(known)}"
        )
    found = read_yaml(path, "swap file")
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds no mapping of arms")
    return found


def _contract(name: str, swap: Swap, base: Contract) -> Contract:
    made = base.swap(**swap.swap) if swap.swap is not None else resolve(swap.contract)  # type: ignore[arg-type]
    # a whole contract brings its own budget; all arms of a study run at the study's
    return made.swap(name=name, budget=base.budget)


def _compare(name: str, base: str, swap: Swap, found: dict[str, Contract]) -> Comparison:
    slots = tuple(differences(found[base], found[name]))
    role: Literal["arm", "null", "oracle"] = "null" if name == NULL else "oracle" if name == ORACLE else "arm"
    if not slots:
        raise ValueError(f"arm '{name}' is the same contract as its base '{base}'")
    if len(slots) > 1 and swap.transfer is None:
        raise ValueError(
            f"arm '{name}' differs from '{base}' in {len(slots)} slots ({', '.join(slots)}), so it is no diagnostic: swap one slot, "
            f"give it another base, or say 'transfer: <stage>' to run it as a transfer"
        )
    if len(slots) == 1 and swap.transfer is not None:
        raise ValueError(f"arm '{name}' differs from '{base}' in '{slots[0]}' alone: leave 'transfer' out")
    return Comparison(name, base, swap.transfer or STAGE_OF_SLOT[slots[0]], slots, role)


def _null(host: Contract) -> Swap:
    return Swap(swap={"ranking": {"kind": "jittered", "of": host.ranking}})


def _oracle(host: Contract) -> Swap:
    """The host with the queries of a right answer: what its access could have been. A host that reads no attention is given mass with them."""
    swap: dict[str, Any] = {"query_law": "oracle"}
    if not host.ranking.statistics:
        swap["ranking"] = "mass"
    if host.schedule.kind != "end_of_prefill":
        swap["schedule"] = "end_of_prefill"
    several = len(differences(host, host.swap(**swap))) > 1
    return Swap(swap=swap, transfer="access" if several else None)
