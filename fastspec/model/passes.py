"""One pass over the rows of a tree, from token ids to logits, in the shape that a cycle repeats."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.transformer import DecodeTransformer
from fastspec.ops.backends import choose
from fastspec.ops.fused_pass import MAX_VISIBLE, FusedPass, TooLargeError, unsupported

#: ``(token_ids [B, R] int64, prefix [B] int64, logit_row [B] int64 or None)`` to ``[B, R or 1, V]`` logits.
TreePass = Callable[..., torch.Tensor]


class ModulePass:
    """The pass by PyTorch's operations: any device and dtype; the reference of the fused one.

    Args:
        transformer: whose weights are read.
        cache: read, and written at rows ``prefix + first_slot + r``.
        mask: ``[R, S]`` bool over the scratch rows after the prefix. Those a row sees stand, in order, for the
            positions from ``prefix`` on, the last of them for its own.
        first_slot: scratch row of the pass's first row.
    """

    def __init__(
        self, transformer: DecodeTransformer, cache: StaticCache, mask: torch.Tensor, first_slot: int = 0
    ):
        self._transformer, self._cache = transformer, cache
        self._mask, self._first_slot = mask, first_slot
        self._offsets = mask.sum(1) - 1

    def __call__(
        self, token_ids: torch.Tensor, prefix: torch.Tensor, logit_row: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits ``[B, R, V]``, or ``[B, 1, V]`` of one row per sequence where ``logit_row`` ``[B]`` is given."""
        hidden = self._transformer.forward(
            self._transformer.embed(token_ids),
            prefix[:, None] + self._offsets,
            self._cache,
            CacheView(prefix, self._mask, self._first_slot),
        )
        if logit_row is not None:
            hidden = hidden.gather(1, logit_row[:, None, None].expand(-1, 1, hidden.shape[-1]))
        return self._transformer.logits(hidden)


def tree_pass(
    transformer: DecodeTransformer, cache: StaticCache, mask: torch.Tensor, first_slot: int = 0
) -> TreePass:
    """The fastest pass that this machine and model allow; see :class:`ModulePass` for the arguments."""
    num_rows = mask.shape[0]
    supported = unsupported(transformer, cache, num_rows) is None and int(mask.sum(1).max()) <= MAX_VISIBLE
    if supported and choose("auto", transformer.device, True) == "cuda":
        with suppress(TooLargeError):
            return FusedPass(transformer, cache, num_rows, mask, first_slot)
    return ModulePass(transformer, cache, mask, first_slot)
