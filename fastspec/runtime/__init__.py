"""How cycles run on a GPU: captured as a graph, launched ahead of the host, reported through pinned memory."""

from fastspec.runtime.capture import capture
from fastspec.runtime.memory import asked_memory
from fastspec.runtime.reports import Reports

__all__ = ["Reports", "asked_memory", "capture"]
