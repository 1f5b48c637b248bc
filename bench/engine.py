"""What the benchmarks measure as the engine: the one place to change when another implementation takes over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.passes import tree_pass
from fastspec.model.transformer import DecodeTransformer
from fastspec.ops.attention import tree_attention, visible_rows

#: One pass, from ``(transformer, cache, mask, first_slot)``.
make_pass = tree_pass


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, rows: int) -> Callable:
    """The engine's product of ``[R, in]`` with a weight ``[out, in]``."""
    return lambda inputs: F.linear(inputs, weight, bias)


def make_attention(
    transformer: DecodeTransformer, cache: StaticCache, layer: int, mask: torch.Tensor
) -> Callable:
    """The engine's attention of queries ``[B, R, heads, head_dim]`` after ``prefix`` ``[B]`` rows of one layer."""

    def attend(queries: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        visible = visible_rows(CacheView(prefix, mask), cache.capacity)
        return tree_attention(queries, cache.keys[layer], cache.values[layer], visible, transformer.scale)

    return attend
