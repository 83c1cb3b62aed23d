"""How long a launch takes: replays of a CUDA graph over rotating inputs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

#: a graph runs at least this long, so that starting it does not count
GRAPH_SECONDS = 2e-3
#: replays of which the median is taken, as many as fit into REPLAY_SECONDS
MIN_REPLAYS, MAX_REPLAYS, REPLAY_SECONDS = 10, 200, 0.3

Launch = Callable[[], object]


class Timer(Protocol):
    """Seconds of one launch, given launches on inputs of their own; each may run `at_most` times, where that matters."""

    def __call__(self, launches: Sequence[Launch], at_most: int | None = None) -> float: ...


def graph_timer(launches: Sequence[Launch], at_most: int | None = None) -> float:
    """Median seconds of a launch over replays of a graph that runs all of them in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes workspaces, before the capture
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    once = _captured(launches, 1)
    _seconds(once)
    cycle = _seconds(once)
    budget = 10**9 if at_most is None else at_most - 3  # runs that a launch has left
    rounds = max(1, min(round(GRAPH_SECONDS / cycle), budget // MIN_REPLAYS))
    graph = once if rounds == 1 else _captured(launches, rounds)
    replays = max(MIN_REPLAYS, min(MAX_REPLAYS, int(REPLAY_SECONDS / (cycle * rounds))))
    replays = max(1, min(replays, budget // rounds - 1))
    _seconds(graph)
    return statistics.median(_seconds(graph) for _ in range(replays)) / (rounds * len(launches))


def _captured(launches: Sequence[Launch], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for launch in launches:
                launch()
    return graph


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth(device: torch.device, timer: Timer, nbytes: int = 1 << 30) -> float:
    """Bytes per second of a copy, reading and writing counted."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / timer([lambda: target.copy_(source)])
