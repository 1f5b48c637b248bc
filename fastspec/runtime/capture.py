"""A cycle, or other straight work, as one CUDA graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

_logger = logging.getLogger("fastspec")


def capture(
    work: Callable[[], None], device: torch.device, name: str = "decoding cycle", keep: bool = False
) -> torch.cuda.CUDAGraph:
    """Captures a straight line of device work.

    It runs once uncaptured, so that kernels are loaded and buffers of libraries made: the state must be one that a
    run does not harm. Tensors that the work leaves behind are the graph's static output.

    Args:
        work: launches it on the current stream, without any decision of the host's.
        device: where.
        name: what the log calls it.
        keep: keeps the graph itself too, so that it can become part of another.

    Returns:
        A graph whose ``replay()`` runs the work on the stream that is current then.
    """
    start = time.perf_counter()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph(keep_graph=keep)
    # Other threads may go on using the device while this one captures.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    if keep:
        with torch.cuda.device(device):
            graph.instantiate()
    _logger.info("captured the %s as a CUDA graph in %.1f s", name, time.perf_counter() - start)
    return graph
