"""The shapes of drafts made from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class DraftSize:
    """A LLaMA's shape.

    Attributes:
        hidden, layers, heads, ffn: width, depth, attention heads, width of the feed-forward layers.
        tied: whether the output projection is the embedding.
    """

    hidden: int
    layers: int
    heads: int
    ffn: int
    tied: bool = False


SIZES = {
    # The draft of 2404.08856 and 2403.00858.
    "115m": DraftSize(1024, 4, 8, 2816),
    # The miniature's drafts.
    "tiny": DraftSize(64, 2, 2, 192, tied=True),
}


def parse_size(text: str) -> DraftSize:
    """A size by its name, or as ``hidden,layers,heads,ffn``.

    Raises:
        ValueError: if it is neither, or the heads do not divide the width.
    """
    if text in SIZES:
        return SIZES[text]
    try:
        hidden, layers, heads, ffn = map(int, text.split(","))
    except ValueError:
        raise ValueError(
            f"size must be {', '.join(SIZES)} or hidden,layers,heads,ffn, got {text!r}"
        ) from None
    if min(hidden, layers, heads, ffn) < 1:
        raise ValueError(f"size must be of positive numbers, got {text!r}")
    if hidden % heads or hidden // heads % 2:
        raise ValueError(f"hidden must be heads times an even head size, got {hidden} and {heads} heads")
    return DraftSize(hidden, layers, heads, ffn)


def new_draft(size: DraftSize, target: PretrainedConfig, tokenizer: Any) -> LlamaForCausalLM:
    """A random LLaMA that speaks the target's vocabulary and reaches as far.

    Args:
        size: its shape.
        target: the target's configuration.
        tokenizer: the target's.
    """
    text, pad = target.get_text_config(), tokenizer.pad_token_id
    return new_llama(
        size,
        text.vocab_size,
        text.max_position_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
    )


def new_llama(
    size: DraftSize, vocab_size: int, max_positions: int, **special: int | None
) -> LlamaForCausalLM:
    """A random LLaMA; ``special`` are its ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        intermediate_size=size.ffn,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=size.tied,
        **special,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model
