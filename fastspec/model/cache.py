"""A static key-value cache with its own length per sequence, and how a pass looks at it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CacheView(NamedTuple):
    """Where the R rows of a pass stand in the cache and what they see.

    Row r's key and value go to cache row ``prefix + first_slot + r``. It sees every row below ``prefix`` and
    those rows ``prefix + s`` for which ``mask[r, s]``.

    Attributes:
        prefix: ``[B]`` int64, committed rows of each sequence.
        mask: ``[R, S]`` bool over the scratch rows after the prefix.
        first_slot: scratch row of the pass's first row.
    """

    prefix: torch.Tensor
    mask: torch.Tensor
    first_slot: int = 0


class StaticCache:
    """Keys and values of all layers: ``[layers, B, kv_heads, capacity, head_dim]`` each.

    Rows beyond a sequence's length hold leftovers that are never read.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (num_layers, batch_size, num_kv_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._sequences = torch.arange(batch_size, device=device)[:, None]

    @property
    def capacity(self) -> int:
        """Rows per sequence."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor, view: CacheView) -> None:
        """Stores the rows of a pass, ``[B, R, kv_heads, head_dim]`` each."""
        rows = view.prefix[:, None] + (view.first_slot + torch.arange(keys.shape[1], device=keys.device))
        self.keys[layer][self._sequences, :, rows] = keys
        self.values[layer][self._sequences, :, rows] = values

    def keep_path(self, prefix: torch.Tensor, path: torch.Tensor) -> None:
        """Makes the rows of an accepted path contiguous after the prefix, in place.

        Args:
            prefix: ``[B]`` int64, committed rows before the pass.
            path: ``[B, D + 1]`` int64, scratch rows to keep, in order.
        """
        target = prefix[:, None] + torch.arange(path.shape[1], device=path.device)
        source = prefix[:, None] + path
        for stored in (self.keys, self.values):
            stored[:, self._sequences, :, target] = stored[:, self._sequences, :, source]
