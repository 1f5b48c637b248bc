"""Weights in 8 bits: a matrix as signed codes with one scale per output.

Only drafts have such weights: whatever the rounding does to q, the law of the output stays the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

LARGEST = 127
#: Rows up to which PyTorch's int8 product on a CPU is faster than its bfloat16 product.
FEW_ROWS = 4


def round_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes ``[out, in]`` int8 and their scales ``[out]`` float32, such that weight ≈ codes · scale.

    Args:
        weight: ``[out, in]``.

    Raises:
        ValueError: if it holds NaN or infinity.
    """
    exact = weight.float()
    largest = exact.abs().amax(1)
    if not torch.isfinite(largest).all():
        raise ValueError("weights that are NaN or infinite cannot be rounded to 8 bits")
    scale = (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (exact / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer without bias, stored as codes and scales.

    Args:
        inputs, outputs: its widths.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("codes", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(outputs))

    def dequantised(self) -> nn.Linear:
        """A plain layer with the rounded weights, in the dtype of the scales."""
        weight = self.codes * self.scale[:, None]
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.codes.to(inputs.dtype)) * self.scale.to(inputs.dtype)


class Int8Weight(torch.Tensor):
    """Codes where a weight matrix is expected: ``F.linear`` multiplies by codes · scale.

    Attributes:
        scale: ``[out]``, in the dtype of the inputs.
    """

    scale: torch.Tensor

    @classmethod
    def stack(cls, layers: Sequence[Int8Linear], dtype: torch.dtype) -> Int8Weight:
        """The codes of layers, one after the other over their outputs, for inputs of a dtype."""
        made = torch.cat([layer.codes for layer in layers]).as_subclass(cls)
        made.scale = torch.cat([layer.scale for layer in layers]).to(dtype)
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None):
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


def has_int8_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether int8 weights are multiplied as they are: on a CPU in bfloat16. Elsewhere they are dequantised once."""
    return device.type == "cpu" and dtype is torch.bfloat16


def _linear(inputs: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    codes, rows = weight.as_subclass(torch.Tensor), inputs.reshape(-1, inputs.shape[-1])
    if len(rows) <= FEW_ROWS:
        product = torch._weight_int8pack_mm(rows.contiguous(), codes, weight.scale)
    else:
        product = F.linear(rows, codes.to(rows.dtype)) * weight.scale
    if bias is not None:
        product = product + bias
    return product.view(*inputs.shape[:-1], -1)
