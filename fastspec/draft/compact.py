"""Compact drafts: an output projection for chosen tokens alone, weights in 8 bits. Both cost only acceptance."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastspec.draft.int8 import Int8Linear, Int8Weight, has_int8_product, round_to_int8
from fastspec.draft.text import TextDraft
from fastspec.model.transformer import DecodeTransformer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class CompactLlamaConfig(LlamaConfig):
    """A LLaMA's configuration, and how it was made compact.

    Attributes:
        draft_vocab_size: K, how many tokens the draft can propose; it reads all ``vocab_size``.
        weight_bits: 8 for int8 weights, 16 for floating-point ones.
    """

    model_type = "fastspec_compact_llama"

    draft_vocab_size: int = 32000
    weight_bits: int = 16


class KeptHead(nn.Module):
    """An output projection with a row for each kept token; the others' logits are -inf, so that q = 0.

    Attributes:
        kept_ids: ``[K]`` int64, ascending: the ids of the rows.
        projection: a linear layer ``[K, hidden]``.
    """

    def __init__(self, hidden_size: int, num_kept: int, vocab_size: int, weight_bits: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.projection = _new_linear(hidden_size, num_kept, weight_bits)
        self.register_buffer("kept_ids", torch.arange(num_kept))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.spread(self.projection(hidden))

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """``[..., K]`` to ``[..., vocab_size]``."""
        every = logits.new_full((*logits.shape[:-1], self.vocab_size), float("-inf"))
        return every.index_copy_(-1, self.kept_ids, logits)


class CompactLlamaForCausalLM(LlamaForCausalLM):
    """A LLaMA that reads every token and proposes K of them.

    :func:`fastspec.training.shrink.shrink` makes it. Its checkpoint is a directory like any other, which
    ``AutoModelForCausalLM.from_pretrained`` loads once :mod:`fastspec.draft` is imported.
    """

    config_class = CompactLlamaConfig
    _tied_weights_keys = None

    def __init__(self, config: CompactLlamaConfig):
        super().__init__(config)
        self.lm_head = KeptHead(
            config.hidden_size, config.draft_vocab_size, config.vocab_size, config.weight_bits
        )
        if config.weight_bits == 8:
            for part, name in _linears(self.model):
                linear = getattr(part, name)
                setattr(part, name, Int8Linear(linear.in_features, linear.out_features))

    @classmethod
    def of(cls, model: LlamaForCausalLM, kept_ids: torch.Tensor, weight_bits: int) -> CompactLlamaForCausalLM:
        """A compact copy of a draft.

        Args:
            model: the draft; its projections must have no biases if their weights are to be rounded.
            kept_ids: ``[K]`` int64, ascending.
            weight_bits: 8 or 16.

        Raises:
            ValueError: for weights that cannot be rounded.
        """
        arguments = model.config.to_dict() | {
            "draft_vocab_size": len(kept_ids),
            "weight_bits": weight_bits,
            "tie_word_embeddings": False,
        }
        for name in ("model_type", "architectures", "_name_or_path"):
            arguments.pop(name, None)
        made = cls(CompactLlamaConfig(**arguments)).to(model.dtype)
        weights = dict(model.state_dict())
        head = weights.pop("lm_head.weight")[kept_ids]
        weights |= {"lm_head.projection.weight": head, "lm_head.kept_ids": kept_ids}
        if weight_bits == 8:
            for name, module in made.named_modules():
                if isinstance(module, Int8Linear):
                    codes, scale = round_to_int8(weights.pop(f"{name}.weight"))
                    weights |= {f"{name}.codes": codes, f"{name}.scale": scale}
        made.load_state_dict(weights)
        made.generation_config = model.generation_config
        return made.eval()


class CompactTransformer(DecodeTransformer):
    """Decodes a compact draft; its logits are those of the kept tokens alone, ``[..., K]``.

    Weights in 8 bits stay so where PyTorch can multiply them, else they are dequantised.

    Args:
        model: the draft, in memory.
    """

    def __init__(self, model: CompactLlamaForCausalLM):
        head = model.lm_head
        super().__init__(_plain_text_model(model), _plain_linear(head.projection))
        if model.config.weight_bits == 8 and has_int8_product(self.device, self.dtype):
            self.layers = [
                packed._replace(
                    qkv=self._stack(layer.self_attn, ATTENTION[:3]),
                    output=self._stack(layer.self_attn, ATTENTION[3:]),
                    gate_up=self._stack(layer.mlp, FEED_FORWARD[:2]),
                    down=self._stack(layer.mlp, FEED_FORWARD[2:]),
                )
                for packed, layer in zip(self.layers, model.model.layers, strict=True)
            ]
            self.lm_head = self._stack(head, ("projection",))

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that one pass reads, the scales of 8-bit weights included."""
        weights = [self.lm_head, *(tensor for layer in self.layers for tensor in layer)]
        scales = [weight.scale for weight in weights if isinstance(weight, Int8Weight)]
        return super().num_bytes + sum(scale.numel() * scale.element_size() for scale in scales)

    def _stack(self, part: nn.Module, names: tuple[str, ...]) -> Int8Weight:
        return Int8Weight.stack([getattr(part, name) for name in names], self.dtype)


class CompactDraft(TextDraft):
    """A compact LLaMA as draft.

    Args:
        model: the draft, in memory.
    """

    def __init__(self, model: CompactLlamaForCausalLM):
        self._kept = _transformer(model)
        self._spread = model.lm_head.spread
        # For the decoder, who compares vocabularies: the draft reads every token.
        self.transformer = copy.copy(self._kept)
        self.transformer.vocab_size = model.lm_head.vocab_size
        self.num_bytes = self._kept.num_bytes

    def allocate(self, *sizes: Any, **more: Any) -> None:
        whole, self.transformer = self.transformer, self._kept
        try:
            super().allocate(*sizes, **more)
        finally:
            self.transformer = whole
        self._read_committed = self._spreading(self._read_committed)
        self._levels = [(nodes, self._spreading(read)) for nodes, read in self._levels]

    def _spreading(self, read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A pass whose logits are of the whole vocabulary, -inf for tokens that the draft cannot propose."""
        return lambda *inputs: self._spread(read(*inputs))


#: What was last made of each model, as long as a draft uses it.
_made: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, weakref.ref[CompactTransformer]]]
_made = weakref.WeakKeyDictionary()


def _transformer(model: CompactLlamaForCausalLM) -> CompactTransformer:
    """The model's transformer, one for all drafts of it: to dequantise takes time and memory."""
    weights = tuple(
        (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)
        for tensor in model.state_dict().values()
    )
    before, reference = _made.get(model, (None, None))
    made = reference() if before == weights else None
    if made is None:
        made = CompactTransformer(model)
        _made[model] = weights, weakref.ref(made)
    return made


def _new_linear(inputs: int, outputs: int, weight_bits: int) -> nn.Module:
    return Int8Linear(inputs, outputs) if weight_bits == 8 else nn.Linear(inputs, outputs, bias=False)


def _linears(text_model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers of a LLaMA: what they are part of, and their names there."""
    return [
        (part, name)
        for layer in text_model.layers
        for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, FEED_FORWARD))
        for name in names
    ]


def _plain_linear(linear: nn.Module) -> nn.Linear:
    return linear.dequantised() if isinstance(linear, Int8Linear) else linear


def _plain_text_model(model: CompactLlamaForCausalLM) -> SimpleNamespace:
    """The parts of a compact LLaMA as those of a plain one."""
    text = model.model
    arguments = model.config.to_dict()
    arguments.pop("model_type")
    layers = [
        SimpleNamespace(
            self_attn=SimpleNamespace(
                **{name: _plain_linear(getattr(layer.self_attn, name)) for name in ATTENTION}
            ),
            mlp=SimpleNamespace(**{name: _plain_linear(getattr(layer.mlp, name)) for name in FEED_FORWARD}),
            input_layernorm=layer.input_layernorm,
            post_attention_layernorm=layer.post_attention_layernorm,
        )
        for layer in text.layers
    ]
    return SimpleNamespace(
        config=LlamaConfig(**arguments),
        embed_tokens=text.embed_tokens,
        layers=layers,
        norm=text.norm,
        rotary_emb=text.rotary_emb,
    )


AutoConfig.register(CompactLlamaConfig.model_type, CompactLlamaConfig)
AutoModelForCausalLM.register(CompactLlamaConfig, CompactLlamaForCausalLM)
