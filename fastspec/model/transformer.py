"""The decode-time LLaMA: prefill of one sequence and passes of many tree rows, on a static cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.weights import check_norms, check_plain, pack_layer
from fastspec.ops.attention import tree_attention, visible_rows
from fastspec.ops.backends import current
from fastspec.ops.causal_attention import causal_attention
from fastspec.ops.prefill import add_norm, choose_backend, gate, rms_norm, rotate, rotate_prompt

TEXT_MODELS = ("llama", "mistral", "qwen2")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class DecodeTransformer:
    """LLaMA, Vicuna, Mistral and Qwen2 text models with 1-D RoPE, reading the weights of a transformers module.

    Projections are fused in place, the module's parameters becoming views (see :mod:`fastspec.model.weights`).
    The transformer keeps tensors only, never the module: nothing calls the module, and its forward hooks do not run.

    Args:
        text_model: a transformers text model such as ``LlamaModel``.
        lm_head: its output projection.

    Raises:
        ValueError: for an architecture that would not be computed as transformers does; the message says
            what is unsupported.
    """

    def __init__(self, text_model: nn.Module, lm_head: nn.Module):
        config = text_model.config
        check_text_model(config)
        check_plain(text_model.embed_tokens, nn.Embedding, "embeddings")
        check_plain(lm_head, nn.Linear, "output projections")
        check_norms(text_model.norm)
        self.hidden_size = config.hidden_size
        self.vocab_size = lm_head.weight.shape[0]
        self.num_layers = config.num_hidden_layers
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.max_positions = config.max_position_embeddings
        self.epsilon = config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]
        self.scale = self.head_dim**-0.5

        self.embedding = text_model.embed_tokens.weight.data
        self.layers = [pack_layer(layer) for layer in text_model.layers]
        self.final_norm = text_model.norm.weight.data
        self.lm_head = lm_head.weight.data
        self.lm_head_bias = None if lm_head.bias is None else lm_head.bias.data
        self.device, self.dtype = self.embedding.device, self.embedding.dtype

        rope = text_model.rotary_emb
        self.inverse_frequencies = rope.inv_freq.float().to(self.device)
        self.rope_scaling = rope.attention_scaling

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one pass reads: the embedding is a gather and does not count."""
        tensors = [self.final_norm, self.lm_head, self.lm_head_bias]
        tensors += [tensor for layer in self.layers for tensor in layer]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def new_cache(self, batch_size: int, capacity: int) -> StaticCache:
        """An empty cache of this model's shape."""
        return StaticCache(
            self.num_layers, batch_size, self.num_kv_heads, capacity, self.head_dim, self.dtype, self.device
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[...]`` ids to ``[..., hidden]``; ids outside the embedding (an absent token) count as id 0."""
        inside = (token_ids >= 0) & (token_ids < self.embedding.shape[0])
        return F.embedding(torch.where(inside, token_ids, 0), self.embedding)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to ``[..., V]``, in the model's dtype."""
        return F.linear(rms_norm(hidden, self.final_norm, self.epsilon), self.lm_head, self.lm_head_bias)

    def prefill(self, embeddings: torch.Tensor, cache: StaticCache, sequence: int) -> torch.Tensor:
        """Runs a whole prompt of one sequence from position 0 and fills its cache rows.

        Args:
            embeddings: ``[T, hidden]``.
            cache: the cache to fill.
            sequence: its row in the batch.

        Returns:
            ``[T, hidden]`` before the final norm.

        Raises:
            ValueError: for a prompt that is longer than the cache, and a backend that cannot run here.
        """
        length = embeddings.shape[0]
        if length > cache.capacity:
            raise ValueError(f"a prompt of {length} tokens does not fit a cache of {cache.capacity} rows")
        backend = choose_backend(self.dtype, self.hidden_size, self.device)
        cos, sin = self._rotation(torch.arange(length, device=self.device))
        keys, values = (
            stored[:, sequence, :, :length].transpose(1, 2).unbind(0) for stored in (cache.keys, cache.values)
        )

        def attend(layer, fused):
            queries = rotate_prompt(fused, cos, sin, keys[layer], values[layer], backend)
            mixed = causal_attention(queries[None], keys[layer][None], values[layer][None], self.scale)
            return mixed.reshape(length, -1)

        with current(self.device):
            return self._run(embeddings.contiguous(), attend, backend)

    def forward(
        self, embeddings: torch.Tensor, positions: torch.Tensor, cache: StaticCache, view: CacheView
    ) -> torch.Tensor:
        """One pass over R rows per sequence.

        Args:
            embeddings: ``[B, R, hidden]``.
            positions: ``[B, R]`` int64 positions for RoPE.
            cache: read, and written at the rows of the view.
            view: where the rows stand and what they see.

        Returns:
            ``[B, R, hidden]`` before the final norm.
        """
        visible = visible_rows(view, cache.capacity)
        batch, rows, _ = embeddings.shape
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        cos, sin = self._rotation(positions[..., None])

        def attend(layer, fused):
            queries, keys, values = fused.view(batch, rows, -1, self.head_dim).split(heads, dim=2)
            cache.write(layer, rotate(keys, cos, sin), values, view)
            queries = rotate(queries, cos, sin)
            mixed = tree_attention(queries, cache.keys[layer], cache.values[layer], visible, self.scale)
            return mixed.reshape(batch, rows, -1)

        return self._run(embeddings, attend)

    def _run(self, hidden: torch.Tensor, attend: Callable, backend: str = "reference") -> torch.Tensor:
        """All layers; ``attend`` makes of a layer's index and fused product what its output projection reads."""
        update = None
        for index, layer in enumerate(self.layers):
            hidden, normed = add_norm(hidden, update, layer.input_norm, self.epsilon, backend)
            mixed = attend(index, F.linear(normed, layer.qkv, layer.qkv_bias))
            update = F.linear(mixed, layer.output, layer.output_bias)
            hidden, normed = add_norm(hidden, update, layer.post_norm, self.epsilon, backend)
            opened = gate(F.linear(normed, layer.gate_up, layer.gate_up_bias), self.activation, backend)
            update = F.linear(opened, layer.down, layer.down_bias)
        return hidden + update

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[..., head_dim]`` of positions ``[...]``."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.rope_scaling, angles.sin() * self.rope_scaling
        return cos.to(self.dtype), sin.to(self.dtype)


def check_text_model(config) -> None:
    """Raises ValueError for a text model that :class:`DecodeTransformer` would not compute exactly."""
    if config.model_type not in TEXT_MODELS:
        raise ValueError(f"unsupported text model {config.model_type!r}; supported: {', '.join(TEXT_MODELS)}")
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"unsupported RoPE {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial rotary embeddings are not supported")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window is not None:
        raise ValueError(
            f"sliding-window attention is not supported (layer_types {sorted(kinds)}, sliding_window {window})"
        )
