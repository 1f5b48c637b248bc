"""Cycles that the device repeats by itself: one launch for a whole generation, with the host reading along."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fastspec.ops.backends import current, extension
from fastspec.state import DecodeState, FinishReason

#: The first version of CUDA that can run a captured graph inside a WHILE node.
SINCE = 12040
#: Seconds between two looks for a report. The device never waits for the host, so this costs no cycle anything.
PAUSE = 20e-6


def loop_obstacle() -> str | None:
    """What keeps this machine from running loops; None if nothing does."""
    try:
        module = extension()
    except ImportError as error:
        return f"fastspec is installed without its CUDA kernels: {error}"
    versions = {
        "the kernels were built with": module.cuda_version,
        "the driver knows": module.driver_version(),
    }
    for what, version in versions.items():
        if version < SINCE:
            return f"{what} CUDA {version // 1000}.{version % 1000 // 10}, and it takes 12.4"
    return None


class Mailbox:
    """What a loop and the host tell each other, in host memory that both can reach.

    There is a slot for every cycle that a launch may run, so the device never waits for the host to read.

    Args:
        most_cycles: of one launch.
        shape: of the report of one cycle, ``[B, width]``.
        load: reads the number at an address, so that whatever was written before it can be read afterwards.
        pin_memory: so that the device can reach it.

    Attributes:
        reports: ``[most_cycles, B, width]`` int64, written by the device.
        published: ``[1]`` int64, how many of them are there, written by the device.
        control: ``[1 + B]`` int64, read by the device after each cycle: how many cycles to run at most, and for
            each sequence whether to end it.
    """

    def __init__(
        self, most_cycles: int, shape: tuple[int, ...], load: Callable[[int], int], pin_memory: bool = True
    ):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=pin_memory)

        self.reports, self.published, self.control = zeros(most_cycles, *shape), zeros(1), zeros(1 + shape[0])
        self._load = load
        self._num_read = 0

    def open(self, cycles: int) -> None:
        """Makes ready for a launch of so many cycles at most, while nothing runs.

        Raises:
            ValueError: for more cycles than there are slots, or none.
        """
        if not 1 <= cycles <= len(self.reports):
            raise ValueError(f"a loop takes 1 to {len(self.reports)} cycles, got {cycles}")
        self._num_read = 0
        self.published.zero_()
        self.control.zero_()
        self.control[0] = cycles

    def pop(self, ended: Callable[[], bool]) -> list[list[int]]:
        """The next report, once it has come.

        Args:
            ended: tells whether the loop has ended, and raises if the device failed.

        Raises:
            RuntimeError: if the loop has ended without this report.
        """
        while not self._has_come():
            # What was published before the loop ended counts, even if it was not there a moment ago.
            if ended() and not self._has_come():
                raise RuntimeError(
                    f"the loop on the device ended after {self._num_read} cycles, and sequences were still running"
                )
            time.sleep(PAUSE)
        self._num_read += 1
        return self.reports[self._num_read - 1].tolist()

    def _has_come(self) -> bool:
        return self._load(self.published.data_ptr()) > self._num_read


class Loop:
    """A captured cycle inside a WHILE node, with a small kernel that hands over its report and decides.

    The loop ends when all sequences have, after a number of cycles, or when the host wants it to.

    Args:
        graph: the captured cycle, with its graph kept.
        state: the sequences that it works on.
        most_cycles: of one launch.

    Raises:
        RuntimeError: if CUDA refuses the graph; :func:`loop_obstacle` tells before what is known to.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, state: DecodeState, most_cycles: int):
        module, report = extension(), state.report
        self._graph = graph  # whose memory the copy inside the loop uses
        self._device = report.device
        self._mailbox = Mailbox(most_cycles, tuple(report.shape), module.load)
        self._turn = torch.zeros(1, dtype=torch.int64, device=self._device)
        with current(self._device):
            self._loop = module.Loop(
                graph.raw_cuda_graph(),
                report.data_ptr(),
                state.reason.data_ptr(),
                self._turn.data_ptr(),
                self._mailbox.reports.data_ptr(),
                self._mailbox.published.data_ptr(),
                self._mailbox.control.data_ptr(),
                *report.shape,
                FinishReason.RUNNING,
                FinishReason.STOPPED,
            )
        self._done = torch.cuda.Event()

    def launch(self, cycles: int) -> None:
        """Queues the loop, of so many cycles at most, after the work on the current stream."""
        self.end()
        self._mailbox.open(cycles)
        with current(self._device):
            stream = torch.cuda.current_stream(self._device)
            self._loop.launch(stream.cuda_stream)
            self._done.record(stream)

    def pop(self) -> list[list[int]]:
        """The report of the next cycle, once it has come.

        Raises:
            RuntimeError: if the device failed, or the loop ended without it.
        """
        return self._mailbox.pop(self._done.query)

    def stop(self, row: int) -> None:
        """Has a sequence ended after the cycle under way."""
        self._mailbox.control[1 + row] = 1

    def end(self) -> None:
        """Has the loop ended after the cycle under way, and waits for that."""
        self._mailbox.control[0] = 0
        self._done.synchronize()
