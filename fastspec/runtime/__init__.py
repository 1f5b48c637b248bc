"""How cycles run on a GPU: in a graph, launched ahead or repeated by the device, reported through pinned memory."""

from fastspec.runtime.capture import capture
from fastspec.runtime.loop import Loop, loop_obstacle
from fastspec.runtime.memory import asked_memory
from fastspec.runtime.reports import Reports

__all__ = ["Loop", "Reports", "asked_memory", "capture", "loop_obstacle"]
