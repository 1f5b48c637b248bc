"""What the engine is compared with: transformers' modules in a graph, and cuBLAS for the linear layers alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache

from fastspec.model.transformer import DecodeTransformer


def transformers_pass(
    text_model: nn.Module,
    lm_head: nn.Module,
    context: int,
    capacity: int,
    mask: torch.Tensor,
    batch_size: int = 1,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A pass of transformers' modules on a StaticCache, fit for a CUDA graph.

    Args:
        text_model, lm_head: the modules.
        context: rows of the cache that are filled, with random numbers.
        capacity: rows of the cache.
        mask: ``[R, R]`` bool, what each row sees of the others.
        batch_size: sequences, all with the same context.

    Returns:
        From tokens ``[B, R]`` to logits ``[B, R, V]``; each call starts from the same context.
    """
    config, weight = text_model.config, lm_head.weight
    device, rows = weight.device, len(mask)
    cache = StaticCache(config=config, max_cache_len=capacity)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch_size, config.num_key_value_heads, head_dim, weight.dtype, device)
    lengths = torch.zeros(len(cache.layers), dtype=torch.int64, device=device)
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length = length  # a view, so that one operation turns all layers back
        layer.keys.normal_()
        layer.values.normal_()
    visible = torch.zeros(batch_size, 1, rows, capacity, dtype=torch.bool, device=device)
    visible[..., :context] = True
    visible[..., context : context + rows] = mask
    positions = (context + mask.sum(1) - 1).expand(batch_size, -1)

    @torch.no_grad()
    def call(token_ids: torch.Tensor) -> torch.Tensor:
        lengths.fill_(context)
        hidden = text_model(
            input_ids=token_ids,
            attention_mask=visible,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return lm_head(hidden)

    return call


def transformers_cycle(
    draft: tuple[nn.Module, nn.Module],
    target: tuple[nn.Module, nn.Module],
    gamma: int,
    draft_context: int,
    context: int,
    token_ids: torch.Tensor,
) -> Callable[[], None]:
    """The passes of a cycle, ``gamma`` of the draft and one of the target, by transformers' modules; nothing else.

    Args:
        draft, target: text model and output projection of each.
        gamma: length of the chain.
        draft_context, context: rows of the caches that are filled.
        token_ids: ``[1, gamma + 1]``, what the target reads.
    """
    rows = gamma + 1
    mask = torch.ones(rows, rows, dtype=torch.bool, device=token_ids.device).tril()
    propose = transformers_pass(*draft, draft_context, draft_context + rows, mask[:1, :1])
    check = transformers_pass(*target, context, context + rows, mask)

    def call() -> None:
        for step in range(gamma):
            propose(token_ids[:, step : step + 1])
        check(token_ids)

    return call


def cublas_linears(transformer: DecodeTransformer, rows: int) -> Callable[[], None]:
    """All linear layers of a pass and nothing else, through PyTorch."""
    weights = [matrix for layer in transformer.layers for matrix in linear_weights(layer)]
    weights.append(transformer.lm_head)
    inputs = {weight.shape[1]: random_inputs(rows, weight) for weight in weights}

    def call() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    return call


def linear_weights(layer) -> tuple[torch.Tensor, ...]:
    """The matrices of one layer of a :class:`DecodeTransformer`."""
    return layer.qkv, layer.output, layer.gate_up, layer.down


def random_inputs(rows: int, weight: torch.Tensor) -> torch.Tensor:
    """``[rows, in]`` for a weight ``[out, in]``."""
    return torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)


def flashinfer_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> Callable[[], torch.Tensor] | None:
    """FlashInfer's prefill with a custom mask, packed beforehand, where it is installed.

    Args:
        queries: ``[R, heads, head_dim]``.
        keys, values: ``[kv_heads, T, head_dim]``.
        visible: ``[R, T]`` bool.
        scale: factor on the scores.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    packed = flashinfer.quantization.packbits(visible.reshape(-1), bitorder="little")
    return lambda: flashinfer.single_prefill_with_kv_cache(
        queries, keys, values, packed_custom_mask=packed, kv_layout="HND", sm_scale=scale
    )
