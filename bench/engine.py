"""What the benchmarks measure as the engine: the one place to change when another implementation takes over."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.setup import Setup
from fastspec import DraftTree
from fastspec.model.cache import StaticCache
from fastspec.model.passes import TreePass, tree_pass
from fastspec.model.transformer import DecodeTransformer

#: One pass, from ``(transformer, cache, mask, first_slot)``.
make_pass = tree_pass
#: The tree of each number of rows that is measured.
TREES = {
    1: DraftTree.chain(0),
    6: DraftTree.chain(5),
    16: DraftTree.kary((3, 2, 1)),
    64: DraftTree.kary((3, 4, 4)),
}


class Work(NamedTuple):
    """A pass and what it reads; calling it runs the pass.

    Attributes:
        run, transformer, cache: the pass, its model and its cache.
        mask: ``[R, R]`` bool, what each row sees of the others.
        token_ids: ``[B, R]`` int64.
        prefix: ``[B]`` int64, committed rows of the cache.
    """

    run: TreePass
    transformer: DecodeTransformer
    cache: StaticCache
    mask: torch.Tensor
    token_ids: torch.Tensor
    prefix: torch.Tensor

    def __call__(self) -> torch.Tensor:
        return self.run(self.token_ids, self.prefix)


def make_work(
    setup: Setup,
    transformer: DecodeTransformer,
    rows: int,
    context: int,
    capacity: int,
    batch_size: int = 1,
) -> Work:
    """A pass over random tokens, after random keys and values.

    Args:
        transformer: whose pass it is.
        rows: a key of ``TREES``, rows per sequence.
        context: committed rows of each sequence.
        capacity: rows of the cache.
        batch_size: sequences.
    """
    mask = TREES[rows].on(setup.device).mask
    cache = transformer.new_cache(batch_size, capacity)
    cache.keys.normal_()
    cache.values.normal_()
    return Work(
        make_pass(transformer, cache, mask),
        transformer,
        cache,
        mask,
        setup.text_ids(batch_size * rows).view(batch_size, rows),
        torch.full((batch_size,), context, device=setup.device),
    )
