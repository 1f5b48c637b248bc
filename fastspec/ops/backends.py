"""Which implementations of the hot operations this machine can run, and which one to take."""

from __future__ import annotations

import importlib
import json
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastspec import environment


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


@lru_cache(maxsize=1)
def extension():
    """The compiled module ``fastspec._C``.

    Raises:
        ImportError: if there is none; the message says why, as far as the installation recorded it.
    """
    try:
        return importlib.import_module("fastspec._C")
    except ImportError as error:
        record = Path(__file__).parent.parent / "build.json"
        reason = f"the compiled module does not load: {error}"
        if isinstance(error, ModuleNotFoundError) and record.is_file():
            reason = json.loads(record.read_text()).get("reason", reason)
        elif isinstance(error, ModuleNotFoundError):
            reason = "the compiled module was never built; install with pip to build it"
        raise ImportError(reason) from None


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """Version of the triton that imports, or None."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _cuda(device: torch.device | None = None) -> Backend:
    try:
        module = extension()
    except ImportError as error:
        return Backend("cuda", False, str(error))
    if not torch.cuda.is_available():
        return Backend("cuda", False, f"built for {module.architectures}, but torch finds no NVIDIA GPU")
    capability = "".join(map(str, torch.cuda.get_device_capability(device)))
    built = [arch.rstrip("af") for arch in module.architectures.split(";")]
    if capability not in built:
        return Backend(
            "cuda", False, f"built for {module.architectures}, but the GPU is of architecture {capability}"
        )
    return Backend(
        "cuda", True, f"CUDA {module.cuda_version // 1000}.{module.cuda_version % 1000 // 10} kernels"
    )


def _triton() -> Backend:
    version = triton_version()
    if version is None:
        return Backend("triton", False, "triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Backend("triton", True, f"triton {version}, interpreted on the CPU (slow)")
    if not torch.cuda.is_available():
        return Backend("triton", False, f"triton {version}, but torch finds no NVIDIA GPU")
    return Backend("triton", True, f"triton {version}")


def backends(device: torch.device | None = None) -> list[Backend]:
    """All implementations, the most preferred first, on a GPU or on the current one."""
    return [_cuda(device), _triton(), Backend("reference", True, "PyTorch, any device")]


def current(device: torch.device) -> AbstractContextManager:
    """Makes a GPU the current one, on which kernels are launched; does nothing for other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose(requested: str, device: torch.device, supported: bool) -> str:
    """The implementation of an operation to use.

    Args:
        requested: a name, or ``"auto"`` for ``FASTSPEC_BACKEND`` and then the best available.
        device: where the tensors are.
        supported: whether the kernels know this case; if not, the reference is taken unless a kernel was
            asked for by argument.

    Raises:
        ValueError: if what was asked for cannot run; the message says why.
    """
    if requested not in environment.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(environment.BACKENDS)}, got {requested!r}")
    if requested != "auto" and not supported and requested != "reference":
        raise ValueError(f"backend {requested!r} does not know this case; use 'reference'")
    name = environment.backend() if requested == "auto" else requested
    if name == "reference" or not supported:
        return "reference"
    on_gpu = device.type == "cuda"
    if name == "auto":
        if not on_gpu:
            return "reference"
        return next(backend.name for backend in backends(device) if backend.available)
    chosen = next(backend for backend in backends(device if on_gpu else None) if backend.name == name)
    if not chosen.available:
        raise ValueError(f"backend {name!r} cannot run here: {chosen.reason}")
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not on_gpu and not interpreted:
        raise ValueError(f"backend {name!r} needs tensors on a GPU, got {device}")
    return name
