"""Attention of a pass's rows over the static cache: the whole prefix, and the tree's own rows by mask."""

from __future__ import annotations

import torch

from fastspec.model.cache import CacheView


def visible_rows(view: CacheView, capacity: int) -> torch.Tensor:
    """``[B, R, capacity]`` bool: which cache rows each row of the pass sees."""
    slots = torch.arange(capacity, device=view.prefix.device) - view.prefix[:, None]
    in_scratch = (slots >= 0) & (slots < view.mask.shape[1])
    tree = view.mask[:, slots.clamp(0, view.mask.shape[1] - 1)].transpose(0, 1)
    return (slots < 0)[:, None] | (in_scratch[:, None] & tree)


def tree_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention over the visible cache rows, in float32 or better; grouped heads where there are fewer keys.

    Args:
        queries: ``[B, R, heads, head_dim]``.
        keys, values: ``[B, kv_heads, capacity, head_dim]``, one layer of the cache.
        visible: ``[B, R, capacity]`` bool; what is not visible is not read, whatever it holds.
        scale: factor on the scores.

    Returns:
        ``[B, R, heads, head_dim]`` in the dtype of the queries.
    """
    batch, rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    compute = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.to(compute).view(batch, rows, kv_heads, heads // kv_heads, head_dim)
    scores = torch.einsum("brkgd,bkcd->bkgrc", grouped, keys.to(compute)) * scale
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    # Zero times NaN is NaN: a leftover, or a drafted token the weights turn into NaN, would spoil rows that
    # do not see it. So such values are left out of the product, and the rows that do see one get their NaN back.
    finite = values.sum(-1, keepdim=True, dtype=compute).isfinite()  # one pass; NaN and inf survive a sum
    mixed = torch.einsum("bkgrc,bkcd->brkgd", weights, torch.where(finite, values.to(compute), 0.0))
    spoiled = (visible[:, :, None] & ~finite[..., 0][:, None]).any(-1)
    mixed = mixed.masked_fill(spoiled[..., None, None], float("nan"))
    return mixed.reshape(batch, rows, heads, head_dim).to(queries.dtype)
