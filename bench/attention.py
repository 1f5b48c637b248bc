"""How long does a pass's attention over the cache take in one layer, beside PyTorch and FlashInfer?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from bench.baselines import flashinfer_attention
from bench.engine import make_work
from bench.phases import phase_bytes, phase_timings
from bench.report import result_row
from bench.setup import Setup
from bench.timing import in_turn, interleaved
from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.transformer import DecodeTransformer
from fastspec.ops.attention import tree_attention, visible_rows

#: Keys, and rows of the pass.
SHAPES = {
    "llava7b": ((900, 1), (900, 6), (900, 64), (2048, 6)),
    "small": ((80, 1), (80, 6), (80, 64)),
}


@torch.no_grad()
def measure(setup: Setup) -> list[dict]:
    """Rows ``attention/kv<keys>/rows<R>``: attention as a phase of the pass (:mod:`bench.phases`).

    The tree's own keys are among the keys. The phase includes the wait for slower blocks; the others are timed alone,
    in a graph, the layers taking turns. Where no fused pass runs, PyTorch's operations are measured as the engine.
    """
    return [row for length, rows in SHAPES[setup.target] for row in _measure(setup, length, rows)]


def _measure(setup: Setup, length: int, rows: int) -> list[dict]:
    transformer = setup.transformer
    work = make_work(setup, transformer, rows, length - rows, length)
    visible = visible_rows(CacheView(work.prefix, work.mask), length)
    queries = torch.randn(1, rows, transformer.num_heads, transformer.head_dim, device=setup.device)
    queries = queries.to(setup.dtype)
    phases = phase_timings(work, setup.samples)
    calls = _baselines(transformer, work.cache, queries, visible)
    if phases is None:
        calls["engine"] = in_turn(
            [
                partial(tree_attention, queries, keys, values, visible, transformer.scale)
                for keys, values in zip(work.cache.keys, work.cache.values, strict=True)
            ]
        )
    others = interleaved(calls, repeats=transformer.num_layers, samples=setup.samples)
    timing = others.pop("engine") if phases is None else phases["attention"]
    num_bytes = phase_bytes(work, length)["attention"]
    name = f"attention/kv{length}/rows{rows}"
    return [
        result_row(name, timing, setup.floor(num_bytes), others, num_bytes=num_bytes),
        *(result_row(f"baseline/{name}/{other}", other_timing) for other, other_timing in others.items()),
    ]


def _baselines(
    transformer: DecodeTransformer, cache: StaticCache, queries: torch.Tensor, visible: torch.Tensor
) -> dict[str, Callable]:
    def pytorch(layer: int) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            cache.keys[layer],
            cache.values[layer],
            attn_mask=visible[:, None],
            scale=transformer.scale,
            enable_gqa=transformer.num_heads != transformer.num_kv_heads,
        )

    layers = range(transformer.num_layers)
    calls = {"torch_sdpa": in_turn([partial(pytorch, layer) for layer in layers])}
    flashinfer = [
        flashinfer_attention(
            queries[0], cache.keys[layer, 0], cache.values[layer, 0], visible[0], transformer.scale
        )
        for layer in layers
    ]
    return calls if flashinfer[0] is None else {**calls, "flashinfer": in_turn(flashinfer)}
