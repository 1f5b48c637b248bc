"""Argument checks that read like a specification: symbolic sizes, bound across tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastspec.sampling import SamplingTensors

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: str,
    sizes: dict[str, int],
    dtypes: Iterable[torch.dtype],
    device: torch.device,
) -> None:
    """Raises unless a tensor has the shape, element type and device it should.

    Args:
        name: what the message calls it.
        tensor: the tensor.
        shape: symbolic sizes such as ``"B N V"``; a size seen for the first time is bound, later ones must agree.
        sizes: the sizes bound so far.
        dtypes: the element types allowed.
        device: where it must be.

    Raises:
        TypeError: for something that is no tensor.
        ValueError: naming the tensor, what was expected and what came.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    symbols = shape.split()
    dtypes = tuple(dtypes)
    bound = dict(sizes)
    fits = tensor.ndim == len(symbols) and tensor.dtype in dtypes and tensor.device == device
    if fits:
        fits = all(
            bound.setdefault(symbol, size) == size for symbol, size in zip(symbols, tensor.shape, strict=True)
        )
    if not fits:
        wanted = ", ".join(f"{symbol}={sizes[symbol]}" if symbol in sizes else symbol for symbol in symbols)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        came = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        raise ValueError(f"{name} must be [{wanted}] {kinds} on {device}, got {came}")
    sizes.update(bound)


def check_sizes(batch_size: int, vocab_size: int) -> None:
    """Raises ValueError for an empty batch or vocabulary, which no kernel can be launched for."""
    for name, size in (("batch_size", batch_size), ("vocab_size", vocab_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_sequences(
    positions: torch.Tensor, sampling: SamplingTensors, sizes: dict[str, int], device: torch.device
) -> None:
    """Raises ValueError unless positions ``[B]`` and sampling parameters are of B sequences and V tokens."""
    check_tensor("positions", positions, "B", sizes, (torch.int64,), device)
    if not positions.is_contiguous():
        raise ValueError(f"positions must be contiguous, got strides {positions.stride()}")
    check_tensor("sampling.temperature", sampling.temperature, "B", sizes, (torch.float64,), device)
    check_tensor("sampling.seen", sampling.seen, "B V", sizes, (torch.bool,), device)


def check_rows(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError unless ``[B, R, V]`` has contiguous rows, all at one stride."""
    batch, rows, row = tensor.stride()
    contiguous = row == 1 or tensor.shape[2] == 1
    regular = batch == rows * tensor.shape[1] or tensor.shape[0] == 1
    if not (contiguous and regular):
        raise ValueError(f"{name} must have contiguous rows at one stride, got strides {tensor.stride()}")
