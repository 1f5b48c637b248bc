"""How long does a target pass take, embedding to logits, beside transformers in a graph and cuBLAS?"""

from __future__ import annotations

import torch
from torch import nn

from bench.baselines import cublas_linears, transformers_pass
from bench.engine import make_pass
from bench.report import result_row
from bench.setup import Setup, kv_bytes
from bench.timing import interleaved
from fastspec import DraftTree
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack

TREES = {
    1: DraftTree.chain(0),
    6: DraftTree.chain(5),
    16: DraftTree.kary((3, 2, 1)),
    64: DraftTree.kary((3, 4, 4)),
}
#: Caches are as long as the multiple of this that holds context and tree.
CAPACITY_STEP = 1024
LONG_CONTEXT = 2048


def measure(setup: Setup) -> list[dict]:
    """Rows ``pass/<target>/rows<R>/ctx<context>``, and what the linear layers alone take."""
    contexts = [setup.context] if setup.quick or setup.target != "llava7b" else [setup.context, LONG_CONTEXT]
    stack = text_stack(setup.target_model)
    return [
        row
        for context in contexts
        for rows in TREES
        for row in measure_pass(
            setup,
            f"pass/{setup.target}/rows{rows}/ctx{context}",
            setup.transformer,
            stack,
            rows,
            context,
            "ms",
        )
    ]


def measure_pass(
    setup: Setup,
    name: str,
    transformer: DecodeTransformer,
    stack: tuple[nn.Module, nn.Module],
    rows: int,
    context: int,
    unit: str,
    repeats: int = 2,
) -> list[dict]:
    """One pass over ``rows`` tree nodes of one sequence, and its baselines.

    Args:
        name: of the row.
        transformer, stack: the model as fastspec and as transformers run it.
        rows: a key of ``TREES``.
        context: committed rows of the cache.
        unit: of the row's time.
        repeats: passes in one graph.
    """
    mask = TREES[rows].on(setup.device).mask
    capacity = -(-(context + rows) // CAPACITY_STEP) * CAPACITY_STEP
    cache = transformer.new_cache(1, capacity)
    cache.keys.normal_()
    cache.values.normal_()
    tokens, prefix = setup.text_ids(rows)[None], torch.tensor([context], device=setup.device)
    ours = make_pass(transformer, cache, mask)
    theirs = transformers_pass(*stack, context, capacity, mask)
    calls = {
        "engine": lambda: ours(tokens, prefix),
        "transformers_graph": lambda: theirs(tokens),
        "cublas_linears": cublas_linears(transformer, rows),
    }
    with torch.no_grad():
        timings = interleaved(calls, repeats, setup.samples)
    num_bytes = transformer.num_bytes + kv_bytes(transformer, context)
    others = {other: timing for other, timing in timings.items() if other != "engine"}
    return [
        result_row(name, timings["engine"], setup.floor(num_bytes), others, unit=unit, num_bytes=num_bytes),
        *(result_row(f"baseline/{name}/{other}", timing, unit=unit) for other, timing in others.items()),
    ]
