"""Several processes for one run, each with a shard of the samples and a file of its own.

The first one loads the model and writes the manifest; the others start when it is there. If one stops with a sentence,
all are stopped and the sentence is the run's; nothing that is recorded is lost, and `kvpress eval resume` goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from kvpress.cli.console import err
from kvpress.errors import InputError
from kvpress.files import write_atomically
from kvpress_eval import manifest as manifests
from kvpress_eval.progress import Bar, read_line
from kvpress_eval.sweep import Sweep, parse_sweep

#: seconds between two looks at the workers
POLL = 0.2


class Worker:
    """One process with its shard; its lines of progress are read in a thread."""

    def __init__(self, arguments: Sequence[str], shard: int, n_shards: int, device: str | None, bar: Bar) -> None:
        command = [
            sys.executable,
            "-m",
            "kvpress",
            "eval",
            *arguments,
            "--shard",
            f"{shard}/{n_shards}",
            "--json-progress",
        ]
        command += ["--device", device] if device else []
        threads = max((os.cpu_count() or 1) // n_shards, 1)
        self.shard, self.bar, self.last_words = shard, bar, ""
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KVPRESS_THREADS": str(threads)},
        )
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read_progress, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    def _read_progress(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = read_line(line)
            if found is not None:
                self.bar(found["task"], found["mode"], found["done"], found["total"], self.shard)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_words = line.strip() or self.last_words

    def check(self) -> bool:
        """Whether the worker has finished.

        Raises:
            InputError: it has failed.
        """
        code = self.process.poll()
        if code is None or code == 0:
            return code == 0
        for reader in self._readers:
            reader.join(timeout=5)
        if code < 0:
            raise InputError(f"worker {self.shard} was killed ({signal.Signals(-code).name}): resume the run")
        raise InputError(self.last_words.removeprefix("error: ") or f"worker {self.shard} failed with code {code}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()


def run_workers(folder: Path, sweep: Sweep | None, devices: Sequence[str | None]) -> None:
    """Begin (with a sweep) or resume (without) a run in one process for each device.

    Raises:
        InputError: a worker has failed; the sentence is its own.
    """
    chosen = sweep
    if chosen is None:
        chosen = parse_sweep(manifests.read(folder)["sweep"], f"'{folder / manifests.NAME}'")
    elif (folder / manifests.NAME).exists():
        raise InputError(f"'{folder}' holds a run already: `kvpress {chosen.command} resume {folder}` goes on with it")
    first = ["resume", str(folder)] if sweep is None else _begin(folder, sweep)
    with Bar(chosen, err) as bar:
        workers = [Worker(first, 1, len(devices), devices[0], bar)]
        try:
            while sweep is not None and not (folder / manifests.NAME).exists() and not workers[0].check():
                time.sleep(POLL)
            for index, device in enumerate(devices[1:], start=2):
                workers.append(Worker(["resume", str(folder)], index, len(devices), device, bar))
            running = list(workers)
            while running := [worker for worker in running if not worker.check()]:
                time.sleep(POLL)
        finally:
            for worker in workers:
                worker.stop()


def _begin(folder: Path, sweep: Sweep) -> list[str]:
    """Arguments that begin a run with this very sweep, which may differ from any file by its options."""
    path = folder / "sweep.yaml"
    write_atomically(path, yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False))
    return ["run", str(path), "--out", str(folder)]
