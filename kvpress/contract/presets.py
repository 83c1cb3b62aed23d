"""Contracts from names, files and mappings. Presets are data: configs/contracts/*.yaml, each with its source."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from kvpress.contract.contract import Contract
from kvpress.errors import ContractError, unknown
from kvpress.slots import Budget, parse_budget
from kvpress.slots.representation import Orthogonal

#: a contract file is a few hundred bytes; anything larger is a mistake or an attack
MAX_BYTES = 256 * 1024


def presets_folder() -> Path:
    """The folder of preset files: inside the installed package, or at the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs" / "contracts"
    return inside if inside.is_dir() else package.parent / "configs" / "contracts"


def preset_names() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def read_yaml(path: str | Path) -> Contract:
    """A contract from a YAML file; its name is the file's stem unless the file gives one.

    Raises:
        ContractError: the file is missing, too large, no YAML, or no contract.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ContractError(f"contract file '{path}' is over {MAX_BYTES // 1024} KiB: it should hold ten slots")
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ContractError(f"contract file '{path}' does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ContractError(f"contract file '{path}' cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        what = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ContractError(f"contract file '{path}' is no valid YAML{where}: {what}") from None
    except RecursionError:
        raise ContractError(f"contract file '{path}' is nested too deeply to be a contract") from None
    if not isinstance(fields, dict):
        raise ContractError(f"contract file '{path}' holds no mapping of slots to choices")
    try:
        return Contract.build({"name": path.stem, **fields})
    except ContractError as error:
        raise ContractError(f"{error} (in '{path}')") from None


def _pinned(contract: Contract) -> Contract:
    """The contract with the digest of its projection file, so that its id says what the file held."""
    representation = contract.representation
    if not isinstance(representation, Orthogonal) or representation.sha256:
        return contract
    try:
        with open(representation.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ContractError(
            f"contract '{contract.name}': projection '{representation.file}' cannot be read ({error.strerror or error})"
        ) from None
    return contract.swap(representation=representation.model_copy(update={"sha256": digest}))


def resolve(source: str | Path | dict[str, Any] | Contract, budget: Any = None) -> Contract:
    """A contract from a preset name, a YAML path, a mapping or a contract, with its budget replaced if one is given.

    Args:
        budget: a Budget, a mapping of the slot, or a short form (0.25, "25%", "512tokens", "20MB").
    """
    if isinstance(source, Contract):
        contract = source
    elif isinstance(source, dict):
        contract = Contract.build(source)
    elif isinstance(source, Path) or str(source).endswith((".yaml", ".yml")):
        contract = read_yaml(source)
    elif source in preset_names():
        contract = read_yaml(presets_folder() / f"{source}.yaml")
    else:
        raise ContractError(unknown("preset", str(source), preset_names()) + "; or give the path of a .yaml file")
    contract = _pinned(contract)
    if budget is None:
        return contract
    chosen = (
        budget
        if isinstance(budget, Budget)
        else Budget.parse(budget)
        if isinstance(budget, dict)
        else parse_budget(budget)
    )
    return contract.swap(budget=chosen)
