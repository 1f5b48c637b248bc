"""Timing on a GPU: graphs, events, medians with their spread. Without one, plain loops, to try the benchmarks."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds per call."""

    median: float
    p10: float
    p90: float


class Loop:
    """What stands for a graph where there is no GPU."""

    def __init__(self, call: Callable[[], object], repeats: int):
        self._call, self._repeats = call, repeats

    def replay(self) -> None:
        for _ in range(self._repeats):
            self._call()


def capture(call: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph | Loop:
    """``repeats`` calls as one CUDA graph, after a warm-up."""
    if not torch.cuda.is_available():
        return Loop(call, repeats)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            call()
    return graph


def time_replays(graph: torch.cuda.CUDAGraph | Loop, repeats: int, samples: int = 60) -> Timing:
    """Microseconds per call of a graph of ``repeats`` calls, by events around each replay."""
    return summary([elapsed(graph.replay) / repeats for _ in range(samples + 5)][5:])


def time_graph(call: Callable[[], object], repeats: int = 50, samples: int = 60) -> Timing:
    """Microseconds per call inside a CUDA graph."""
    return time_replays(capture(call, repeats), repeats, samples)


def time_eager(call: Callable[[], object], repeats: int = 20, samples: int = 20) -> Timing:
    """Microseconds per call launched one by one, host work included."""

    def several():
        for _ in range(repeats):
            call()

    several()
    return summary([elapsed(several) / repeats for _ in range(samples)])


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int | dict[str, int] = 50, samples: int = 60
) -> dict[str, Timing]:
    """Times several variants in graphs of so many calls, taking turns so that drift hits all alike."""
    each = repeats if isinstance(repeats, dict) else dict.fromkeys(calls, repeats)
    graphs = {name: capture(call, each[name]) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(samples + 5):
        for name, graph in graphs.items():
            microseconds = elapsed(graph.replay) / each[name]
            if sample >= 5:
                times[name].append(microseconds)
    return {name: summary(values) for name, values in times.items()}


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of several each time, so that none finds its data in the cache."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def elapsed(run: Callable[[], object]) -> float:
    """Microseconds of the work that ``run`` launches on the current stream."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def summary(values: Sequence[float]) -> Timing:
    """The median of at least two samples, with its spread."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), deciles[0], deciles[-1])
