"""What cycles committed, on its way to the host without stopping the device."""

from __future__ import annotations

from collections import deque

import torch


class Reports:
    """A ring of host copies of one small device tensor, pinned so that copying never waits.

    Args:
        report: the device tensor that each cycle overwrites.
        depth: most copies on their way, at least 1.
    """

    def __init__(self, report: torch.Tensor, depth: int):
        self._report = report
        self._on_gpu = report.is_cuda
        if self._on_gpu:
            self._slots = torch.zeros(
                (depth, *report.shape), dtype=report.dtype, device="cpu", pin_memory=True
            )
            self._events = [torch.cuda.Event() for _ in range(depth)]
        self._free = deque(range(depth))
        self._coming: deque[int] = deque()

    def __len__(self) -> int:
        """Copies on their way."""
        return len(self._coming)

    def push(self) -> None:
        """Sends a copy of the tensor after the work that is queued on the current stream."""
        slot = self._free.popleft()
        if self._on_gpu:
            self._slots[slot].copy_(self._report, non_blocking=True)
            self._events[slot].record(torch.cuda.current_stream(self._report.device))
        self._coming.append(slot)

    def pop(self) -> list[list[int]]:
        """The oldest copy, once it has arrived."""
        slot = self._coming.popleft()
        self._free.append(slot)
        if not self._on_gpu:
            return self._report.tolist()
        self._events[slot].synchronize()
        return self._slots[slot].tolist()

    def clear(self) -> None:
        """Forgets the copies on their way, after they have arrived."""
        while self._coming:
            self.pop()
