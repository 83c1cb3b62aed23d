"""LongBench's own files, from its hub repositories: `kvpress data fetch longbench` and `longbench-v2`.

The v1 repository holds a loading script that current clients refuse to run and the archive it reads; only the archive is
downloaded. Its parts keep the licences of their sources; v2 is Apache-2.0.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from kvpress.errors import InputError


def fetch_longbench(folder: Path) -> list[Path]:
    """Download LongBench v1 (114 MB) to `<folder>/longbench/data.zip`; it is read from there without unpacking.

    Raises:
        InputError: the hub cannot be reached, or what it gives is not LongBench's archive.
    """
    path = _download("THUDM/LongBench", "data.zip", folder / "longbench")
    try:
        with zipfile.ZipFile(path) as archive:
            complete = "data/narrativeqa.jsonl" in archive.namelist()
    except zipfile.BadZipFile:
        complete = False
    if not complete:
        raise InputError(f"'{path}' is not LongBench's archive: delete it and fetch it again")
    return [path]


def fetch_longbench_v2(folder: Path) -> list[Path]:
    """Download LongBench v2 (465 MB) to `<folder>/longbench-v2/data.json`.

    Raises:
        InputError: the hub cannot be reached.
    """
    return [_download("THUDM/LongBench-v2", "data.json", folder / "longbench-v2")]


def _download(repository: str, name: str, target: Path) -> Path:
    """The file in `target`; one that is there already stays."""
    from huggingface_hub import hf_hub_download

    if (target / name).is_file():
        return target / name
    try:
        target.mkdir(parents=True, exist_ok=True)
        return Path(hf_hub_download(repository, name, repo_type="dataset", local_dir=target))
    except Exception as error:  # the hub's client lets errors of several libraries through
        raise InputError(
            f"{name} of {repository} cannot be had from the hub ({type(error).__name__}): copy it to '{target / name}'"
        ) from error
