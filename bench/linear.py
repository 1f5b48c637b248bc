"""How long do the linear layers take for a few rows, beside cuBLAS?"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from bench.baselines import linear_weights, random_inputs
from bench.engine import make_linear
from bench.report import result_row
from bench.setup import Setup
from bench.timing import in_turn, interleaved

NAMES = ("qkv", "output", "gate_up", "down")
ROWS = (1, 6, 16, 64)


def measure(setup: Setup) -> list[dict]:
    """Rows ``linear/<projection>/rows<R>``: one layer's product, the layers taking turns so that none is cached."""
    transformer = setup.transformer
    projections = dict(zip(NAMES, zip(*map(linear_weights, transformer.layers), strict=True), strict=True))
    projections["head"] = (transformer.lm_head,)
    return [
        _measure(setup, f"linear/{name}/rows{rows}", weights, rows)
        for name, weights in projections.items()
        for rows in ROWS
    ]


def _measure(setup: Setup, name: str, weights: tuple[torch.Tensor, ...], rows: int) -> dict:
    inputs = random_inputs(rows, weights[0])
    calls = {
        "engine": in_turn([partial(make_linear(weight, None, rows), inputs) for weight in weights]),
        "cublas": in_turn([partial(F.linear, inputs, weight) for weight in weights]),
    }
    timings = interleaved(calls, repeats=max(len(weights), 8), samples=setup.samples)
    others = {"cublas": timings["cublas"]}
    num_bytes = weights[0].nbytes
    return result_row(name, timings["engine"], setup.floor(num_bytes), others, num_bytes=num_bytes)
