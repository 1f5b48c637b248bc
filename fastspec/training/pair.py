"""The draft that is trained and the target it is trained for."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, PretrainedConfig

from fastspec.command import load_draft, load_target
from fastspec.draft.compact import CompactLlamaForCausalLM
from fastspec.draft.pooling import image_pooling, pool_images
from fastspec.model.transformer import check_text_model
from fastspec.model.vision import MULTIMODAL_MODELS, image_token_id, is_multimodal
from fastspec.training.adapter import add_image_adapter, freeze
from fastspec.training.sizes import new_draft, parse_size
from fastspec.vocabulary import check_vocabularies

if TYPE_CHECKING:
    from fastspec.training.train import Training

DEFAULT_SIZE = "115m"


@dataclass(frozen=True)
class Pair:
    """What a training works with.

    Attributes:
        processor: the target's.
        target: frozen and on the device; None if it is not asked.
        draft: in float32, with what is trained marked.
        image_token_id: the target's placeholder.
        pad_token_id: what rows are padded with.
    """

    processor: Any
    target: nn.Module | None
    draft: nn.Module
    image_token_id: int
    pad_token_id: int

    @property
    def draft_sees_images(self) -> bool:
        return is_multimodal(self.draft)

    @property
    def image_pooling(self) -> int:
        """Side of the squares of image features that become one image token of the draft's."""
        return image_pooling(self.draft)


def load_pair(asked: Training, device: str, with_target: bool) -> Pair:
    """Loads or makes both.

    Raises:
        TypeError: for a target that is no LLaVA.
        ValueError: for a checkpoint that cannot be loaded, a draft that does not fit the target, or arguments that
            do not fit together.
    """
    if asked.draft is not None and asked.size is not None:
        raise ValueError("--size is for a new draft; --draft has its own")
    if asked.draft == "ngram":
        raise ValueError("draft 'ngram' is no model that could be trained")
    size = parse_size(asked.size or DEFAULT_SIZE)
    folder = _target_folder(asked.target)
    config = _load(AutoConfig, folder)
    if config.model_type not in MULTIMODAL_MODELS:
        raise TypeError(
            f"target must be a LLaVA-shaped model ({', '.join(MULTIMODAL_MODELS)}), got model_type "
            f"{config.model_type!r} in {asked.target}"
        )
    target = None
    if with_target or asked.image_adapter:
        gpu = device.startswith("cuda")
        dtype = "bfloat16" if gpu and torch.cuda.is_bf16_supported() else "float32"
        processor, target = load_target(SimpleNamespace(target=asked.target, dtype=dtype, device=device))
        target.requires_grad_(False)
    else:
        processor = _load(AutoProcessor, folder)

    if asked.draft is None:
        draft = new_draft(size, config, processor.tokenizer)
    else:
        draft = _load_trainable(asked.draft, config, processor.tokenizer)
    if asked.image_pooling != 1 and (not asked.image_adapter or is_multimodal(draft)):
        raise ValueError(
            "--image-pooling is for a new image adapter: pass --image-adapter and a text-only draft"
        )
    if asked.image_adapter and not is_multimodal(draft):
        draft = add_image_adapter(draft, target, asked.image_pooling)
    freeze(draft, asked.train)
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Pair(
        processor,
        target if with_target else None,
        draft,
        image_token_id(SimpleNamespace(config=config)),
        0 if pad is None else pad,
    )


def _load_trainable(name: str, target: PretrainedConfig, tokenizer: Any) -> nn.Module:
    """A draft from disk, in single precision, that speaks the target's vocabulary."""
    draft, its_tokenizer = load_draft(SimpleNamespace(draft=name, dtype="float32", device="cpu"))
    if isinstance(draft, CompactLlamaForCausalLM):
        raise ValueError(
            f"the compact draft in {name} is not trained further: train its original, then shrink it"
        )
    text = draft.config.get_text_config()
    check_text_model(text)
    check_vocabularies(target.get_text_config().vocab_size, text.vocab_size, tokenizer, its_tokenizer)
    if is_multimodal(draft):
        if draft.config.model_type != "llava" or target.model_type != "llava":
            raise ValueError(
                "an image draft can be trained if it and its target are of model_type 'llava', got "
                f"{draft.config.model_type!r} and {target.model_type!r}"
            )
        if draft.config.vision_config.image_size != target.vision_config.image_size:
            raise ValueError(
                f"draft and target take images of other sizes: {draft.config.vision_config.image_size} and "
                f"{target.vision_config.image_size}"
            )
        pool_images(draft)
    return draft


def _target_folder(name: str) -> str:
    if name != "miniature":
        return name
    from fastspec import miniature

    return str(miniature.WEIGHTS / "target")


def _load(loader: Any, name: str) -> Any:
    try:
        return loader.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the target from {name}: {error}") from None
