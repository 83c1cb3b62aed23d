"""Connecting to a Ray cluster, and how many shards it can run at once. What Ray says of itself is kept from the user."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, TextIO, cast

from kvpress.errors import InputError

#: seconds in which a cluster's port must answer
CONNECT = 5.0
#: bytes of a local cluster's object store; shards pass nothing through it, and Ray takes no less
STORE = 80_000_000


@dataclass(frozen=True)
class Share:
    """What a shard takes of the cluster.

    gpus: 0.5 puts two shards on one GPU; None is 1 where the cluster has GPUs, else 0. cpus: also its threads.

    Raises:
        InputError: no cluster could give it.
    """

    gpus: float | None = None
    cpus: float = 1.0

    def __post_init__(self) -> None:
        gpus = self.gpus or 0.0
        if not (0 <= gpus <= 1 or (math.isfinite(gpus) and gpus > 1 and gpus == int(gpus))):
            raise InputError(f"{gpus:g} GPUs for a shard: give a share of one, such as 0.5, or a whole number")
        if not (math.isfinite(self.cpus) and self.cpus > 0):
            raise InputError(f"{self.cpus:g} CPUs for a shard: give more than 0")

    @property
    def threads(self) -> int:
        return max(int(self.cpus), 1)

    def fit(self, nodes: Sequence[Mapping[str, float]]) -> tuple[Share, int]:
        """The share with its GPUs decided, and how many shards run at once on nodes with these resources.

        Raises:
            InputError: none does, so that a run would wait for ever.
        """
        most = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("GPU", "CPU")}
        gpus = float(most["GPU"] > 0) if self.gpus is None else self.gpus
        n_fitting = sum(_n_on_node(node, gpus, self.cpus) for node in nodes)
        if not n_fitting:
            raise InputError(
                f"no node of the Ray cluster has {gpus:g} GPUs and {self.cpus:g} CPUs for a shard (the most on one are "
                f"{most['GPU']:g} and {most['CPU']:g}): use smaller --gpus-per-shard and --cpus-per-shard"
            )
        return replace(self, gpus=gpus), n_fitting


def _n_on_node(node: Mapping[str, float], gpus: float, cpus: float) -> int:
    slack = 1e-9  # ten shards of 0.1 fit
    n_fitting = int(node.get("CPU", 0.0) / cpus + slack)
    if gpus:
        has = node.get("GPU", 0.0)
        # a shard lies on one GPU: two of 0.4 fit there, not two and a half
        n_fitting = min(n_fitting, int(has * int(1 / gpus + slack)) if gpus <= 1 else int(has / gpus))
    return n_fitting


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster; one that this process has already is used and kept.

    address: "auto" is the cluster of RAY_ADDRESS, else the one on this machine; "local" starts one here and ends it with
        the block; else HOST:PORT.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else each worker warns that this will change
    if address != "local":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # 20 tries take a quarter of an hour
    ray = import_ray()
    with redirect_stdout(cast(TextIO, _Answers(sys.stdout))):
        if ray.is_initialized():
            yield
            return
        _connect(ray, address)
        try:
            yield
        finally:
            ray.shutdown()


def import_ray() -> Any:
    """The library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise InputError(
            "--ray needs ray: install it with pip install 'kvpress-engine[ray]' (in a clone: '.[ray]')"
        ) from None
    return ray


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE, **quiet)
        return
    found = (os.environ.get("RAY_ADDRESS") or address) if address == "auto" else address
    remedy = "start one with `ray start --head`, give another HOST:PORT, or use --ray local"
    if found.startswith("ray://"):
        raise InputError(f"'{found}' is an address of Ray's client: run on a node of the cluster, with --ray auto")
    if found == "auto":
        why = "none runs on this machine and RAY_ADDRESS is not set"
    elif why := unreachable(found):
        raise InputError(f"no Ray cluster at '{found}': {why}; {remedy}")
    else:
        why = ""
    try:
        ray.init(address=found, **quiet)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        why = why if isinstance(error, ConnectionError) and why else str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"no Ray cluster can be used at '{found}': {why}; {remedy}") from None


def unreachable(address: str) -> str:
    """Why nothing listens there; Ray itself would try for minutes. Empty if something does."""
    parts = re.fullmatch(r"\[?([^\]]+)\]?:(\d{1,5})", address)
    if parts is None or not 0 < int(parts[2]) < 2**16:
        return "that is no HOST:PORT"
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=CONNECT).close()
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    return ""


class _Answers:
    """Stdout without what Ray's threads print there, whatever log_to_driver says: stdout is for answers."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return len(text) if threading.current_thread().name.startswith("ray_") else self._stream.write(text)
