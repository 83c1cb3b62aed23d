"""What one Ray task does: it checks its node, loads the model, and answers its shard's samples.

A task whose worker is lost is started again, maybe on another node, and goes on behind the last whole record. The worker
may only seem lost; so long as it holds the file of the shard, the new one waits: a shard never has two writers.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvpress import __version__
from kvpress.errors import InputError
from kvpress_eval import manifest as manifests
from kvpress_eval.ray.board import Place
from kvpress_eval.records import Mode, RecordFile
from kvpress_eval.runner import Runner
from kvpress_eval.sweep import Sweep
from kvpress_eval.units import Shard

#: seconds to wait for another writer; an NFS server frees a lost machine's locks after its lease, 90 seconds by default
PATIENCE = 300.0
#: seconds between two tries, doubled each time up to the last
PAUSES = (0.5, 15.0)


@dataclass(frozen=True)
class Job:
    """What all tasks of a run are told.

    sweep: of a run that begins, None for one that goes on. token: name of a file that the driver wrote into the folder.
    workdir, environment: the driver's, for relative paths and the data folder. version: of the driver's package.
    """

    folder: Path
    sweep: Sweep | None
    token: str
    device: str
    threads: int
    workdir: str = field(default_factory=os.getcwd)
    environment: dict[str, str] = field(
        default_factory=lambda: {name: value for name, value in os.environ.items() if name.startswith("KVPRESS_")}
    )
    version: str = __version__


def run_shard(job: Job, shard: Shard, board: Any) -> int:
    """Do a shard's work and tell the board (an actor handle of `Board`); the number of new records.

    Raises:
        KvpressError: the node is not fit for the run, or as `Runner.begin`, `resume` and `run`.
    """
    check_node(job)
    _settle(job)
    begins = job.sweep is not None and not (job.folder / manifests.NAME).exists()
    runner = Runner.begin(job.sweep, job.folder, job.device) if begins and job.sweep else None
    runner = runner or Runner.resume(job.folder, job.device)
    board.begin.remote(shard.i, Place(socket.gethostname(), os.getpid()))
    wait_for_file(job.folder / shard.file_name)
    told: list[Any] = []

    def tell(task: str, mode: Mode, done: int, total: int) -> None:
        told[:] = [board.note.remote(shard.i, task, mode, done, total)]

    n_new = runner.run(shard, tell)
    _wait(told)
    return n_new


def check_node(job: Job) -> None:
    """Raise InputError if this node has another version of the package, or does not see the run's folder."""
    host = socket.gethostname()
    if job.version != __version__:
        raise InputError(
            f"node '{host}' has kvpress-engine {__version__} and the driver {job.version}: install one version on all nodes"
        )
    if not (job.folder / job.token).is_file():
        raise InputError(
            f"node '{host}' does not see the run's folder '{job.folder}': put it on a file system that all nodes share"
        )


def wait_for_file(path: Path, patience: float = PATIENCE, pauses: tuple[float, float] = PAUSES) -> None:
    """Wait until no other process writes to a file of records.

    Raises:
        InputError: one still does when patience (seconds) is at its end.
    """
    until, (pause, longest) = time.monotonic() + patience, pauses
    while True:
        try:
            RecordFile(path).close()
            return
        except InputError:
            if time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _settle(job: Job) -> None:
    """Make this process work as the driver would."""
    import torch

    from kvpress.cli.console import quiet_transformers

    os.environ.update(job.environment)
    if Path(job.workdir).is_dir():  # a node without it serves sweeps that name no relative path
        os.chdir(job.workdir)
    torch.set_num_threads(job.threads)
    quiet_transformers()


def _wait(told: list[Any]) -> None:
    """Let the last word reach the board, so that the bar ends at its end."""
    if told:
        import ray

        ray.wait(told, timeout=10)
