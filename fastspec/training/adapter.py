"""The image-adapter draft: a compact LLaVA with the target's vision tower and a projector of its own."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from fastspec.draft.pooling import pool, pool_images

#: What is trained: the projector alone, or the language model with it.
PARTS = ("adapter", "all")


def add_image_adapter(
    draft: LlamaForCausalLM, target: nn.Module, pooling: int = 1
) -> LlavaForConditionalGeneration:
    """A LLaVA of the draft's language model, the target's vision tower and a random projector between them.

    Args:
        draft: the language model; its weights are copied.
        target: a LLaVA; its tower's weights are copied, in the draft's precision.
        pooling: side of the squares of image features that the draft gets the means of: 2 makes 144 image tokens of
            576. Kept in the config as ``image_pooling``.

    Raises:
        ValueError: for a target of another shape than LLaVA's, whose images come in tiles or by other projectors,
            a draft without a row for the image placeholder, or features that such squares do not fill.
    """
    ours, theirs = draft.config, target.config
    if theirs.model_type != "llava":
        raise ValueError(f"an image adapter needs a target of model_type 'llava', got {theirs.model_type!r}")
    if theirs.image_token_id >= ours.vocab_size:
        raise ValueError(
            f"the image placeholder {theirs.image_token_id} is outside the draft's vocabulary of {ours.vocab_size}"
        )
    if pooling < 1:
        raise ValueError(f"image pooling must be at least 1, got {pooling}")
    pool(torch.zeros(1, theirs.image_seq_length, 1), pooling)
    text = ours.to_dict()
    text.pop("_name_or_path", None)  # where the draft lay is nobody's business
    config = LlavaConfig(
        vision_config=theirs.vision_config.to_dict(),
        text_config=text,
        image_token_id=theirs.image_token_id,
        image_seq_length=theirs.image_seq_length,
        projector_hidden_act=theirs.projector_hidden_act,
        multimodal_projector_bias=theirs.multimodal_projector_bias,
        vision_feature_select_strategy=theirs.vision_feature_select_strategy,
        vision_feature_layer=theirs.vision_feature_layer,
        tie_word_embeddings=ours.tie_word_embeddings,
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.eos_token_id,
        pad_token_id=ours.pad_token_id,
        **({"image_pooling": pooling} if pooling > 1 else {}),
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(target.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(draft.model.state_dict())
    model.lm_head.load_state_dict(draft.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = draft.generation_config
    pool_images(model)
    return model


def freeze(draft: nn.Module, part: str) -> None:
    """Lets only a part learn; the vision tower never does.

    Args:
        draft: a text-only or a LLaVA-shaped draft.
        part: ``adapter`` for the projector alone, ``all`` for everything but the tower.

    Raises:
        ValueError: for another part, or the adapter of a draft that has none.
    """
    if part not in PARTS:
        raise ValueError(f"what is trained must be one of {', '.join(PARTS)}, got {part!r}")
    projector = getattr(draft.model, "multi_modal_projector", None)
    if part == "adapter" and projector is None:
        raise ValueError("a text-only draft has no adapter to train")
    draft.requires_grad_(part == "all")
    if projector is not None:
        projector.requires_grad_(True)
        draft.model.vision_tower.requires_grad_(False)
