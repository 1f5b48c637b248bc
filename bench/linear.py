"""How long do the linear layers take within a pass, beside cuBLAS?"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from bench.baselines import linear_weights, random_inputs
from bench.engine import TREES, make_work
from bench.phases import phase_bytes, phase_timings
from bench.report import result_row
from bench.setup import Setup
from bench.timing import in_turn, interleaved

NAMES = ("qkv", "output", "gate_up", "down")


@torch.no_grad()
def measure(setup: Setup) -> list[dict]:
    """Rows ``linear/<projection>/rows<R>``: one layer's product as a phase of the pass (:mod:`bench.phases`).

    The phase includes the wait for slower blocks and what the pass does beside the product: the norm, RoPE and the
    write into the cache, SiLU, the residual. cuBLAS makes the product alone, in a graph, the layers taking turns so
    that none is cached. Where no fused pass runs, PyTorch's product is the engine's too.
    """
    projections = dict(
        zip(NAMES, zip(*map(linear_weights, setup.transformer.layers), strict=True), strict=True)
    )
    projections["head"] = (setup.transformer.lm_head,)
    return [row for rows in TREES for row in _measure(setup, projections, rows)]


def _measure(setup: Setup, projections: dict[str, tuple[torch.Tensor, ...]], rows: int) -> list[dict]:
    work = make_work(setup, setup.transformer, rows, setup.context, setup.context + rows)
    phases, num_bytes = phase_timings(work, setup.samples), phase_bytes(work, setup.context)
    results = []
    for name, weights in projections.items():
        inputs = random_inputs(rows, weights[0])
        others = interleaved(
            {"cublas": in_turn([partial(F.linear, inputs, weight) for weight in weights])},
            repeats=max(len(weights), 8),
            samples=setup.samples,
        )
        timing = others["cublas"] if phases is None else phases[name]
        size = num_bytes[name]
        results.append(
            result_row(f"linear/{name}/rows{rows}", timing, setup.floor(size), others, num_bytes=size)
        )
    return results
