"""The shapes that are measured: LLaVA-1.5-7B with its draft of 115 M, and small ones to try the benchmarks."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from fastspec.training.sizes import SIZES, DraftSize

#: Each target, with the draft that is measured beside it.
TARGETS = {"llava7b": "115m", "small": "small"}
DRAFTS = {"115m": SIZES["115m"], "small": DraftSize(128, 1, 2, 256)}
_BOS, _EOS = 1, 2


def target_config(name: str) -> LlavaConfig:
    """The configuration of a target.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TARGETS:
        raise ValueError(f"target must be {' or '.join(TARGETS)}, got {name!r}")
    large = name == "llava7b"
    vocab_size = 32064 if large else 512
    image, pad = (32000, 32001) if large else (vocab_size - 2, vocab_size - 1)
    ids = {"bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": pad}
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4096 if large else 256,
        intermediate_size=11008 if large else 512,
        num_hidden_layers=32 if large else 2,
        num_attention_heads=32 if large else 4,
        num_key_value_heads=32 if large else 4,
        max_position_embeddings=4096 if large else 256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **ids,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024 if large else 32,
        intermediate_size=4096 if large else 64,
        num_hidden_layers=24 if large else 2,
        num_attention_heads=16 if large else 2,
        image_size=336 if large else 28,
        patch_size=14,
        projection_dim=768 if large else 32,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_token_id=image,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **ids,
    )


def draft_config(name: str, target: LlavaConfig) -> LlamaConfig:
    """The configuration of a text-only draft with the target's vocabulary.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DRAFTS:
        raise ValueError(f"draft must be {' or '.join(DRAFTS)}, got {name!r}")
    size, text = DRAFTS[name], target.text_config
    return LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
