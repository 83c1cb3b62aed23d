"""The shards of a run as Ray tasks: started, watched, and started again on another worker when theirs is lost."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from kvpress.cli.console import err
from kvpress.errors import InputError, KvpressError
from kvpress.files import write_atomically
from kvpress_eval import manifest as manifests
from kvpress_eval.progress import Bar, JsonLines
from kvpress_eval.ray.board import Board, Place
from kvpress_eval.ray.cluster import Share, connected
from kvpress_eval.ray.shard import Job, run_shard
from kvpress_eval.records import Mode
from kvpress_eval.runner import Progress
from kvpress_eval.sweep import Sweep, parse_sweep
from kvpress_eval.units import Shard

#: seconds between two looks at the tasks
POLL = 0.2
#: how often a shard is started again
RETRIES = 3


def run_on_ray(
    folder: Path,
    sweep: Sweep | None,
    address: str,
    n_shards: int | None = None,
    share: Share | None = None,
    json_progress: bool = False,
) -> None:
    """Begin (with a sweep) or resume (without) a run on the cluster at `address` (see `connected`).

    n_shards: by default as many as the cluster runs at once.

    Raises:
        KvpressError: there is no cluster, it is not fit for the run, or a shard has failed; the sentence is its own.
    """
    folder = folder.resolve()
    if sweep is not None and (folder / manifests.NAME).exists():
        raise InputError(f"'{folder}' holds a run already: `kvpress {sweep.command} resume {folder}` goes on with it")
    chosen = sweep or parse_sweep(manifests.read(folder)["sweep"], f"'{folder / manifests.NAME}'")
    with connected(address):
        import ray

        share, n_fitting = (share or Share()).fit([node["Resources"] for node in ray.nodes() if node["Alive"]])
        with token(folder) as name, JsonLines() if json_progress else Bar(chosen, err) as progress:
            job = Job(folder, sweep, name, "cuda" if share.gpus else "cpu", share.threads)
            RayRun(job, n_shards or n_fitting, share, progress).run()


@contextmanager
def token(folder: Path) -> Iterator[str]:
    """Name of a file in the folder of a run by which nodes can tell that they see it; it goes with the block.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / f".shared-{uuid.uuid4().hex}"
    is_new = not folder.exists()
    write_atomically(path, "")
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


class RayRun:
    """The tasks of one run. `places` says where each shard runs, once its model is loaded."""

    def __init__(self, job: Job, n_shards: int, share: Share, progress: Progress, retries: int = RETRIES) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.job, self.retries = job, retries
        self.places: dict[int, Place] = {}
        self._sums = Sums(progress, n_shards)
        self._waiting = [Shard(index, n_shards) for index in range(1, n_shards + 1)]
        self._running: dict[Any, Shard] = {}
        self._losses: Counter[Shard] = Counter()
        remote: Any = ray.remote
        # Ray would retry without end a task that was out of memory; here every loss counts, and the user is told
        self._task = remote(run_shard).options(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Board).remote()

    def run(self) -> None:
        """Do the whole run.

        Raises:
            KvpressError: a shard has failed, or lost its worker once too often. What is recorded stays.
        """
        import ray

        try:
            self._start(self._waiting.pop(0))  # it writes the manifest of a run that begins
            while self._running:
                done, _ = ray.wait(list(self._running), timeout=POLL)
                self._read_board()
                for task in done:
                    self._finish(task)
                if self.job.sweep is None or not self._running or (self.job.folder / manifests.NAME).exists():
                    while self._waiting:
                        self._start(self._waiting.pop(0))
            self._read_board()
        finally:
            self._stop()

    def _start(self, shard: Shard) -> None:
        self._running[self._task.remote(self.job, shard, self._board)] = shard

    def _finish(self, task: Any) -> None:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

        shard = self._running.pop(task)
        try:
            ray.get(task)
        except RayTaskError as error:
            raise_cause(error)
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            self._start_again(shard, "Ray ended it for want of memory" if isinstance(error, OutOfMemoryError) else "")
        except RayError as error:
            raise InputError(
                f"shard {shard.i} of {shard.n} has ended ({type(error).__name__}): resume the run"
            ) from None

    def _start_again(self, shard: Shard, why: str) -> None:
        place = self.places.pop(shard.i, None)
        where = f" on '{place.host}'" if place else ""
        self._losses[shard] += 1
        lost = f"shard {shard.i} of {shard.n} has lost its worker{where}{f': {why}' if why else ''}"
        if self._losses[shard] > self.retries:
            raise InputError(f"{lost} {self._losses[shard]} times: see to the cause and resume the run")
        err.print(f"{lost}; it goes on with another", markup=False, highlight=False, soft_wrap=True)
        self._start(shard)

    def _read_board(self) -> None:
        import ray

        places, counts = ray.get(self._board.take.remote())
        self.places.update(places)
        for (task, mode, shard), (done, total) in counts:
            self._sums.note(task, mode, shard, done, total)

    def _stop(self) -> None:
        """End what still runs; every whole record stays."""
        import ray

        running = list(self._running)
        for task in running:
            ray.cancel(task, force=True)
        if running:
            ray.wait(running, num_returns=len(running), timeout=10)
        ray.kill(self._board)


def raise_cause(error: Any) -> None:
    """Raise what a task raised (`RayTaskError`): a user's mistake as it was, anything else with the worker's traceback.

    Raises:
        KvpressError: the mistake, or a node without this package.
    """
    if isinstance(error.cause, KvpressError):
        raise error.cause from None
    if "failed to import on the worker" in str(error.cause):
        why = str(error.cause).strip().split("\n")[-1]
        raise InputError(
            f"a node of the Ray cluster cannot load kvpress-engine ({why}): install the same version on all nodes"
        ) from None
    raise error


class Sums:
    """Progress of a run from that of its shards; shards that have not begun a task count as the mean of the others."""

    def __init__(self, progress: Progress, n_shards: int) -> None:
        self.progress, self.n_shards = progress, n_shards
        self._seen: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}

    def note(self, task: str, mode: str, shard: int, done: int, total: int) -> None:
        """A shard has done so many of its items in a task."""
        seen = self._seen.setdefault((task, mode), {})
        seen[shard] = done, total
        guess = sum(total for _, total in seen.values()) * self.n_shards / len(seen)
        self.progress(task, cast(Mode, mode), sum(done for done, _ in seen.values()), round(guess))
