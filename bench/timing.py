"""Timing on a GPU: graphs, events, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Microseconds per call."""

    median: float
    p10: float
    p90: float


def capture(call: Callable[[], object], repeats: int = 1) -> torch.cuda.CUDAGraph:
    """``repeats`` calls as one CUDA graph, after a warm-up."""
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


def time_replays(graph: torch.cuda.CUDAGraph, repeats: int, samples: int = 60) -> Timing:
    """Microseconds per call of a graph of ``repeats`` calls, by events around each replay."""
    return _summary([_events(graph.replay) / repeats for _ in range(samples + 5)][5:])


def time_graph(call: Callable[[], object], repeats: int = 50, samples: int = 60) -> Timing:
    """Microseconds per call inside a CUDA graph."""
    return time_replays(capture(call, repeats), repeats, samples)


def time_eager(call: Callable[[], object], repeats: int = 20, samples: int = 20) -> Timing:
    """Microseconds per call launched one by one, host work included."""

    def several():
        for _ in range(repeats):
            call()

    several()
    return _summary([_events(several) / repeats for _ in range(samples)])


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int = 50, samples: int = 60
) -> dict[str, Timing]:
    """Times several variants in graphs, taking turns so that drift hits all alike."""
    graphs = {name: capture(call, repeats) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(samples + 5):
        for name, graph in graphs.items():
            elapsed = _events(graph.replay) / repeats
            if sample >= 5:
                times[name].append(elapsed)
    return {name: _summary(values) for name, values in times.items()}


def _events(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _summary(values: list[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10)
    return Timing(statistics.median(values), deciles[0], deciles[-1])
