"""Fewer image tokens for a draft: squares of neighbouring features averaged before the adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def pool(features: torch.Tensor, side: int) -> torch.Tensor:
    """Means over squares of ``side`` x ``side`` features of an image: ``[n, T, width]`` to ``[n, T / side², width]``.

    Raises:
        ValueError: if the features are no square that such squares fill.
    """
    count, places, width = features.shape
    edge = math.isqrt(places)
    if edge * edge != places or edge % side:
        raise ValueError(f"{places} image features cannot be pooled by {side} x {side}")
    grid = features.view(count, edge // side, side, edge // side, side, width)
    return grid.mean((2, 4)).flatten(1, 2)


def image_pooling(model: nn.Module) -> int:
    """The side of a LLaVA's squares, which its config names ``image_pooling``; 1 where nothing is pooled."""
    return getattr(model.config, "image_pooling", 1)


def pool_images(model: nn.Module) -> None:
    """Makes a LLaVA pool as its config says, wherever its adapter is used. The checkpoint is that of any LLaVA.

    Calling it again changes nothing.
    """
    side, projector = image_pooling(model), model.model.multi_modal_projector
    if side > 1 and not any(isinstance(hook, _Pooling) for hook in projector._forward_pre_hooks.values()):
        projector.register_forward_pre_hook(_Pooling(side))


class _Pooling:
    def __init__(self, side: int):
        self._side = side

    def __call__(self, projector: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return pool(inputs[0], self._side), *inputs[1:]
