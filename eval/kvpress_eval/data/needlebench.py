"""NeedleBench's own files, from its hub repository: `kvpress data fetch needlebench`. They are MIT-licensed, except that
the essays belong to their author.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from kvpress.errors import InputError
from kvpress_eval.data.files import file_sha256

REPOSITORY = "opencompass/NeedleBench"
GET = "kvpress data fetch needlebench"
#: sha256 of the files that the v2 tasks read
SHA256 = {
    "needles.jsonl": "b7aee75f89d08a2b830b0392acb849bcbcd57ce53806d22d43f81c60e1746101",
    "names.json": "07f02b1687fbdbfb59d9ed5ff31ff5939aadc2ef7e14715af81142e38b25a98a",
    "PaulGrahamEssays.jsonl": "78ad877447201471578c69dd4fc11e6f489970966329468c5d0ac32292d53056",
    "zh_finance.jsonl": "e4cf5469be5b3eecee5c5e1e99b98bd4c6f7ade9bba0de52fc8000349130c7ea",
}


def fetch_needlebench(folder: Path) -> list[Path]:
    """Download the files into `<folder>/needlebench`; those that are there already are only checked.

    Raises:
        InputError: the hub cannot be reached, or a file has another content than the one the tasks were checked with.
    """
    from huggingface_hub import hf_hub_download

    target = folder / "needlebench"
    target.mkdir(parents=True, exist_ok=True)
    for name, sha256 in SHA256.items():
        path = target / name
        if path.is_file() and file_sha256(path) == sha256:
            continue
        try:
            cached = Path(hf_hub_download(REPOSITORY, name, repo_type="dataset"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name} of {REPOSITORY} cannot be had from the hub ({type(error).__name__}): copy NeedleBench's files "
                f"into '{target}', or use the task family needlebench-recipe, which needs none of them"
            ) from None
        if file_sha256(cached) != sha256:
            raise InputError(
                f"{name} of {REPOSITORY} is another version than the one these tasks were checked with: put the file with "
                f"sha256 {sha256[:12]}... into '{target}'"
            )
        partial = path.with_suffix(path.suffix + ".part")
        shutil.copyfile(cached, partial)
        partial.replace(path)
    return [target / name for name in SHA256]
