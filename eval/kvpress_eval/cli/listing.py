"""What `kvpress eval list` shows."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from kvpress_eval.scorers import SCORERS
from kvpress_eval.sweep import sweeps_folder
from kvpress_eval.tasks import TASKS


def listing(family: str | None = None) -> dict[str, Any]:
    """Tasks (of one family or all), metrics and sweeps, JSON-able."""
    tasks = [
        {
            "task": task.name,
            "family": task.family,
            "needs_length": task.needs_length,
            "in_macro": task.in_macro,
            "description": task.description,
            "caveat": task.caveat,
        }
        for task in TASKS.values()
        if family is None or family in (task.family, task.name)
    ]
    metrics = {name: scorer.version for name, scorer in sorted(SCORERS.items())}
    return {"tasks": tasks, "metrics": metrics, "sweeps": sorted(path.stem for path in sweeps_folder().glob("*.yaml"))}


def print_listing(found: dict[str, Any], console: Console) -> None:
    """Families with their tasks; a single family with descriptions."""
    families: dict[str, list[dict[str, Any]]] = {}
    for task in found["tasks"]:
        families.setdefault(task["family"], []).append(task)
    if len(families) == 1:
        table = Table("task", "what is asked", "beware")
        for task in found["tasks"]:
            table.add_row(task["task"], task["description"], task["caveat"])
        console.print(table)
        return
    table = Table("family", "tasks", "length")
    for name, tasks in families.items():
        short = ", ".join(task["task"].removeprefix(f"{name}/") for task in tasks)
        table.add_row(name, short, "needed" if any(task["needs_length"] for task in tasks) else "own")
    console.print(table)
    console.print(f"sweeps: {', '.join(found['sweeps'])}", soft_wrap=True)
    console.print("`kvpress eval list FAMILY` describes its tasks", soft_wrap=True)
