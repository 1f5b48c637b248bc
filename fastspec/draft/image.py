"""A compact LLaVA as draft: it gets the image at prefill, through its own adapter."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from fastspec.draft.pooling import pool_images
from fastspec.draft.sharing import encode_shared, share_vision_tower
from fastspec.draft.text import TextDraft
from fastspec.model.vision import Prompt, check_pixel_values


class ImageDraft(TextDraft):
    """A LLaVA-shaped draft. Its image tokens need not be as many as the target's, but not more.

    A vision tower that is a copy of the target's runs once for both; see :meth:`attach`.

    Args:
        model: a ``LlavaForConditionalGeneration`` or another supported LLaVA-shaped model that needs nothing
            but pixels.

    Raises:
        ValueError: for an architecture that is not supported.
    """

    def __init__(self, model: nn.Module):
        sizes = inspect.signature(model.model.get_image_features).parameters.get("image_sizes")
        if sizes is not None and sizes.default is inspect.Parameter.empty:
            raise ValueError(
                f"a draft that cuts images into tiles is not supported, got model_type {model.config.model_type!r}"
            )
        super().__init__(model)
        #: The model, for its vision tower and adapter.
        self.model = model
        if model.config.model_type == "llava":
            pool_images(model)

    def attach(self, target: nn.Module) -> None:
        """Uses the target's vision tower in place of its own, if they are equal."""
        share_vision_tower(target, self.model)

    def check(self, prompt: Prompt) -> None:
        if not prompt.images:
            return
        if prompt.pixel_values is None:
            raise ValueError(
                "an image draft needs pixel_values, got image features only: call fastspec.generate, or bind "
                "them with fastspec.custom_generate(draft=..., pixel_values=...)"
            )
        check_pixel_values(self.model, prompt.pixel_values, "the draft's pixel_values")

    def prompt_embeddings(self, prompt: Prompt) -> torch.Tensor:
        if not prompt.images:
            return super().prompt_embeddings(prompt)
        images = encode_shared(self.model, {"pixel_values": prompt.pixel_values}, look_back=True)
        embeddings = torch.cat(list(self._pieces(prompt, images)))
        if len(embeddings) > prompt.num_tokens:
            raise ValueError(
                f"the draft's image tokens make its prompt {len(embeddings)} tokens long, longer than the "
                f"target's {prompt.num_tokens}"
            )
        return embeddings

    def _pieces(self, prompt: Prompt, images: tuple[torch.Tensor, ...]):
        """Text runs and images in order; each image stands where the target's first feature of it stood."""
        text = self.transformer.embed(prompt.input_ids)
        placeholders = (prompt.input_ids == prompt.image_token_id).nonzero()[:, 0].tolist()
        starts, filled = {}, 0
        for target_image, draft_image in zip(prompt.images, images, strict=True):
            starts[placeholders[filled]] = draft_image.to(text)
            filled += target_image.shape[0]
        skip = set(placeholders)
        for place in range(prompt.num_tokens):
            if place in starts:
                yield starts[place]
            if place not in skip:
                yield text[place : place + 1]
