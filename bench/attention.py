"""How long does a pass's attention over the cache take in one layer, beside PyTorch and FlashInfer?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from bench.baselines import flashinfer_attention
from bench.engine import make_attention
from bench.passes import TREES
from bench.report import result_row
from bench.setup import Setup, kv_bytes
from bench.timing import in_turn, interleaved
from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.transformer import DecodeTransformer
from fastspec.ops.attention import visible_rows

LENGTHS = {"llava7b": (900, 2048), "small": (80,)}


@torch.no_grad()
def measure(setup: Setup) -> list[dict]:
    """Rows ``attention/kv<keys>/rows<R>``: the tree's own keys are among them; the layers take turns."""
    return [
        row
        for length in LENGTHS[setup.target][: 1 if setup.quick else None]
        for rows in TREES
        for row in _measure(setup, length, rows)
    ]


def _measure(setup: Setup, length: int, rows: int) -> list[dict]:
    transformer, device = setup.transformer, setup.device
    mask = TREES[rows].on(device).mask
    prefix = torch.tensor([length - rows], device=device)
    cache = transformer.new_cache(1, length)
    cache.keys.normal_()
    cache.values.normal_()
    queries = torch.randn(1, rows, transformer.num_heads, transformer.head_dim, device=device)
    queries = queries.to(setup.dtype)
    layers = range(transformer.num_layers)
    visible = visible_rows(CacheView(prefix, mask), length)
    calls = {
        "engine": in_turn(
            [partial(make_attention(transformer, cache, layer, mask), queries, prefix) for layer in layers]
        ),
        **_baselines(transformer, cache, queries, visible),
    }
    timings = interleaved(calls, repeats=len(layers), samples=setup.samples)
    num_bytes = kv_bytes(transformer, length) // transformer.num_layers
    name = f"attention/kv{length}/rows{rows}"
    others = {other: timing for other, timing in timings.items() if other != "engine"}
    return [
        result_row(name, timings["engine"], setup.floor(num_bytes), others, num_bytes=num_bytes),
        *(result_row(f"baseline/{name}/{other}", timing) for other, timing in others.items()),
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
