"""`kvpress contracts`: the presets, one contract in full, and what two contracts differ in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kvpress.cli.console import out, print_json

app = typer.Typer(help="Look at contracts: what a selector is, as data.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Source = Annotated[str, typer.Argument(help="Preset name or YAML file.", show_default=False)]
BudgetOption = Annotated[str | None, typer.Option("--budget", "-b", help="Replace the contract's budget.")]


@app.command("list")
def list_presets(as_json: Json = False) -> None:
    """Names and descriptions of the presets."""
    from rich.table import Table

    from kvpress.contract import preset_names, resolve

    contracts = [resolve(name) for name in preset_names()]
    if as_json:
        print_json([{"name": c.name, "id": c.id, "description": c.description} for c in contracts])
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("preset", no_wrap=True, style="bold")
    table.add_column("description")
    for contract in contracts:
        table.add_row(contract.name, contract.description)
    out.print(table)


@app.command("show")
def show(source: Source, budget: BudgetOption = None, as_json: Json = False) -> None:
    """A contract as YAML, with its id."""
    from kvpress.contract import resolve

    contract = resolve(source, budget)
    if as_json:
        print_json({"id": contract.id, **contract.model_dump(mode="json")})
        return
    print(f"# id: {contract.id}")
    print(contract.to_yaml(), end="")


@app.command("diff")
def diff(first: Source, second: Source, as_json: Json = False) -> None:
    """The slots in which two contracts differ: exactly one makes their comparison a diagnostic."""
    from rich.table import Table

    from kvpress.contract import differences, resolve

    a, b = resolve(first), resolve(second)
    slots = differences(a, b)
    verdict = {0: "equal", 1: "diagnostic"}.get(len(slots), "transfer")
    choices = {slot: [getattr(c, slot).model_dump(mode="json") for c in (a, b)] for slot in slots}
    if as_json:
        print_json({"verdict": verdict, "first": a.id, "second": b.id, "slots": choices})
        return
    if slots:
        table = Table(box=None, pad_edge=False)
        table.add_column("slot", no_wrap=True, style="bold")
        table.add_column(a.name)
        table.add_column(b.name)
        for slot, (left, right) in choices.items():
            table.add_row(slot, _words(left, right), _words(right, left))
        out.print(table)
    reason = {
        "equal": "no slot differs",
        "diagnostic": f"only '{slots[0] if slots else ''}' differs, so a difference in score has one cause",
        "transfer": f"{len(slots)} slots differ, so a difference in score has no single cause",
    }[verdict]
    print(f"{verdict}: {reason}")


def _words(choice: dict[str, Any], other: dict[str, Any]) -> str:
    """A choice in a table cell: its kind, then its fields; of two choices of one kind only the fields that differ."""
    same_kind = choice["kind"] == other["kind"]
    shown = {name: value for name, value in choice.items() if name != "kind"}
    if same_kind:
        shown = {name: value for name, value in shown.items() if value != other[name]}
    # a text may hold line breaks, which would tear the cell apart
    fields = ", ".join(f"{name} {' '.join(str(value).split())}" for name, value in shown.items())
    return f"{choice['kind']} ({fields})" if fields else str(choice["kind"])
