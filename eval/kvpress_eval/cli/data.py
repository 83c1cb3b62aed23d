"""`kvpress data`: get benchmark files, build the stand-ins, and see what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpress.cli.console import err, out, print_json

#: data sets that come from their hub repository: what is there, and one of the files that it becomes
HUB = {
    "longbench": ("THUDM/LongBench, 114 MB", "longbench/data.zip"),
    "longbench-v2": ("THUDM/LongBench-v2, 465 MB", "longbench-v2/data.json"),
    "needlebench": ("opencompass/NeedleBench, 5 MB", "needlebench/needles.jsonl"),
}

app = typer.Typer(help="Benchmark data: get it, build stand-ins, see what is there.", no_args_is_help=True)

To = Annotated[
    Path | None,
    typer.Option("--to", help="Folder to put the files in [default: $KVPRESS_DATA or ~/.cache/kvpress/data]."),
]
From = Annotated[
    Path | None, typer.Option("--from", help="Folder with the wheels, instead of downloading them.", file_okay=False)
]


@app.command("fetch")
def fetch_command(
    group: Annotated[
        str,
        typer.Argument(
            help="One of those that `kvpress data list` shows, such as ruler or longbench.", show_default=False
        ),
    ],
    to: To = None,
    wheels: From = None,
) -> None:
    """Get the files of a benchmark and check their sha256. What is there already is not fetched again."""
    from kvpress.errors import InputError, unknown
    from kvpress_eval.data import data_folder
    from kvpress_eval.data.fetch import fetch
    from kvpress_eval.data.packages import GROUPS

    folder = (to or data_folder()).expanduser()
    if group in GROUPS:
        paths = fetch(group, folder, wheels=wheels, log=lambda line: err.print(line, markup=False, highlight=False))
    elif group not in HUB:
        raise InputError(unknown("data set", group, {*GROUPS, *HUB}))
    elif wheels is not None:
        raise InputError(f"{group} comes from its hub repository and not in wheels: leave out --from")
    else:
        paths = _from_hub(group, folder)
    out.print(f"{group}: {len(paths)} files in '{folder}'", markup=False, highlight=False, soft_wrap=True)


def _from_hub(group: str, folder: Path) -> list[Path]:
    from kvpress_eval.data.fetch import fetch
    from kvpress_eval.data.longbench import fetch_longbench, fetch_longbench_v2
    from kvpress_eval.data.needlebench import fetch_needlebench

    if group == "needlebench":  # its lengths are counted with a tokenizer that is no part of it
        fetch("needlebench-recipe", folder, log=lambda line: err.print(line, markup=False, highlight=False))
    fetchers = {"longbench": fetch_longbench, "longbench-v2": fetch_longbench_v2, "needlebench": fetch_needlebench}
    return fetchers[group](folder)


@app.command("build")
def build_command(
    what: Annotated[str, typer.Argument(help="standins", show_default=False)],
    to: To = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 42,
) -> None:
    """Build offline stand-ins in LongBench's format from fetched files."""
    from kvpress.errors import InputError, unknown
    from kvpress_eval.data import Data, data_folder

    if what != "standins":
        raise InputError(unknown("data set to build", what, ["standins"]))
    from kvpress_eval.data.standins import build_standins

    folder = (to or data_folder()).expanduser()
    built = build_standins(folder, Data([folder]), seed=seed)
    out.print(f"{what}: in '{built}'", markup=False, highlight=False, soft_wrap=True)


@app.command("list")
def list_command(
    to: To = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """What can be fetched, what of it is there, and under which licence."""
    from kvpress_eval.data import data_folder
    from kvpress_eval.data.fetch import present
    from kvpress_eval.data.packages import GROUPS

    folder = (to or data_folder()).expanduser()
    rows: list[dict[str, Any]] = [
        {
            "data set": group,
            "files": sorted(member.target for member in package.members),
            "from": f"{package.name} {package.version}",
            "present": present(package, folder) is not None,
            "licences": sorted({member.licence for member in package.members}),
        }
        for group, packages in GROUPS.items()
        for package in packages
    ]
    rows += [
        {"data set": group, "files": [file], "from": source, "present": (folder / file).is_file(), "licences": []}
        for group, (source, file) in HUB.items()
    ]
    if as_json:
        print_json({"folder": str(folder), "data": rows})
        return
    for row in rows:
        state = "[green]present[/green]" if row["present"] else "[yellow]missing[/yellow]"
        out.print(f"[bold]{row['data set']:<19}[/bold] {state}  {row['from']}", soft_wrap=True, highlight=False)
        details = [", ".join(_short(row["files"])), *row["licences"]]
        out.print(
            "\n".join(f"    {detail}" for detail in details), style="dim", markup=False, highlight=False, soft_wrap=True
        )
    out.print(f"\nin '{folder}'; get what is missing with `kvpress data fetch DATA-SET`", markup=False, soft_wrap=True)


def _short(targets: list[str]) -> list[str]:
    """Files of one folder as one line."""
    folders = [target.rpartition("/")[0] for target in targets]
    together = {folder for folder in folders if folder.startswith("ruler/punkt") or folder == "tiktoken"}
    kept = [target for target, folder in zip(targets, folders, strict=True) if folder not in together]
    return sorted([*kept, *(f"{folder}/" for folder in together)])
