"""Which implementations of the hot operations this machine can run."""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    """An implementation of the hot operations.

    Attributes:
        name: as in ``FASTSPEC_BACKEND``.
        available: whether it can run here.
        reason: why not, or what it runs on.
    """

    name: str
    available: bool
    reason: str


def backends() -> list[Backend]:
    """All implementations, the most preferred first."""
    return [Backend("reference", True, "PyTorch, any device")]
