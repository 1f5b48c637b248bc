"""Every environment variable of fastspec, typed; a bad value is an error. Imports nothing but the standard library."""

from __future__ import annotations

import os

BACKENDS = ("auto", "reference", "triton", "cuda")


def backend() -> str:
    """``FASTSPEC_BACKEND``: which implementation of the hot operations to use; ``auto`` takes the best available."""
    value = os.environ.get("FASTSPEC_BACKEND", "auto")
    if value not in BACKENDS:
        raise ValueError(f"FASTSPEC_BACKEND must be one of {', '.join(BACKENDS)}, got {value!r}")
    return value


def max_image_pixels() -> int:
    """``FASTSPEC_MAX_IMAGE_PIXELS``: largest image file that is decoded, width times height; 64 million unless set."""
    value = os.environ.get("FASTSPEC_MAX_IMAGE_PIXELS", "64000000")
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"FASTSPEC_MAX_IMAGE_PIXELS must be a positive integer, got {value!r}")
    return int(value)


def cuda_build() -> str:
    """``FASTSPEC_CUDA``: ``auto`` builds the CUDA extension where nvcc is found, 1 insists, 0 leaves it out."""
    value = os.environ.get("FASTSPEC_CUDA", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"FASTSPEC_CUDA must be auto, 0 or 1, got {value!r}")
    return value


def cuda_archs() -> tuple[str, ...]:
    """``FASTSPEC_CUDA_ARCHS``: architectures to build for, such as ``80;90a``; empty means the default set."""
    value = os.environ.get("FASTSPEC_CUDA_ARCHS", "")
    archs = tuple(arch.strip() for arch in value.replace(",", ";").split(";") if arch.strip())
    for arch in archs:
        if not arch.rstrip("af").isdecimal():
            raise ValueError(f"FASTSPEC_CUDA_ARCHS must list architectures such as 80;90a, got {arch!r}")
    return archs
