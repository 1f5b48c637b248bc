"""How long does a target pass take, embedding to logits, beside transformers in a graph and cuBLAS?"""

from __future__ import annotations

import torch
from torch import nn

from bench.baselines import cublas_linears, transformers_pass
from bench.engine import TREES, make_work
from bench.phases import phase_rows
from bench.report import result_row
from bench.setup import Setup, kv_bytes
from bench.timing import interleaved
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack

#: Caches are as long as the multiple of this that holds context and tree.
CAPACITY_STEP = 1024
LONG_CONTEXT = 2048
#: Sequences of a full batch, and the rows of each.
BATCH_SIZE, BATCH_ROWS = 8, 6


def measure(setup: Setup) -> list[dict]:
    """Rows ``pass/<target>/rows<R>/ctx<context>``, those of :func:`measure_pass`, and of eight sequences
    ``pass/<target>/batch8/rows<R of each>/ctx<context>``.
    """
    contexts = [setup.context] if setup.quick or setup.target != "llava7b" else [setup.context, LONG_CONTEXT]
    shapes = [(1, rows, context) for context in contexts for rows in TREES]
    stack = text_stack(setup.target_model)
    results = []
    for batch_size, rows, context in [*shapes, (BATCH_SIZE, BATCH_ROWS, setup.context)]:
        batch = f"batch{batch_size}/" if batch_size > 1 else ""
        name = f"pass/{setup.target}/{batch}rows{rows}/ctx{context}"
        results += measure_pass(
            setup, name, setup.transformer, stack, rows, context, "ms", batch_size=batch_size
        )
    return results


def measure_pass(
    setup: Setup,
    name: str,
    transformer: DecodeTransformer,
    stack: tuple[nn.Module, nn.Module],
    rows: int,
    context: int,
    unit: str,
    repeats: int = 2,
    batch_size: int = 1,
) -> list[dict]:
    """One pass over the tree nodes of some sequences, its baselines, and its phases (:mod:`bench.phases`).

    Args:
        name: of the row; those of the phases are ``<name>/<phase>``.
        transformer, stack: the model as fastspec and as transformers run it.
        rows: a key of ``TREES``, nodes of each sequence.
        context: committed rows of the cache of each sequence.
        unit: of the row's time.
        repeats: passes in one graph.
        batch_size: sequences.
    """
    capacity = -(-(context + rows) // CAPACITY_STEP) * CAPACITY_STEP
    ours = make_work(setup, transformer, rows, context, capacity, batch_size)
    theirs = transformers_pass(*stack, context, capacity, ours.mask, batch_size)
    calls = {
        "engine": ours,
        "transformers_graph": lambda: theirs(ours.token_ids),
        "cublas_linears": cublas_linears(transformer, batch_size * rows),
    }
    with torch.no_grad():
        timings = interleaved(calls, repeats, setup.samples)
        phases = phase_rows(setup, name, ours)
    engine = timings.pop("engine")
    num_bytes = transformer.num_bytes + batch_size * kv_bytes(transformer, context)
    return [
        result_row(name, engine, setup.floor(num_bytes), timings, unit=unit, num_bytes=num_bytes),
        *phases,
        *(result_row(f"baseline/{name}/{other}", timing, unit=unit) for other, timing in timings.items()),
    ]
