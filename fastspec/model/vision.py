"""Prompts with images: features by transformers, placeholders replaced, images dealt out to prompts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastspec.runtime.encoder_graphs import EncoderGraphs

_graphs = EncoderGraphs()
MULTIMODAL_MODELS = ("llava", "vipllava", "llava_next", "llava_onevision", "internvl", "mistral3")


@dataclass(frozen=True)
class Prompt:
    """One sequence's prompt, without padding.

    Attributes:
        input_ids: ``[T]`` int64, with one placeholder id per image feature.
        image_token_id: that id.
        images: features ``[T_i, hidden]`` of each image of the prompt, in order.
        pixel_values: the images as the processor made them, for a draft with eyes of its own; one leading
            entry per image, or None where only features were handed over.
        checked: whether placeholders and features are known to match, by :func:`deal_images`. Else they are
            counted, for which the host waits for the device.

    Raises:
        ValueError: if there are not as many placeholders as features.
    """

    input_ids: torch.Tensor
    image_token_id: int = -1
    images: tuple[torch.Tensor, ...] = ()
    pixel_values: torch.Tensor | None = field(default=None, repr=False)
    checked: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self):
        if self.checked:
            return
        placeholders = int((self.input_ids == self.image_token_id).sum())
        features = sum(len(image) for image in self.images)
        if placeholders != features:
            raise ValueError(
                f"the prompt has {placeholders} image placeholders (id {self.image_token_id}), "
                f"but its images have {features} features"
            )

    @property
    def num_tokens(self) -> int:
        """Length of the prompt, image features included."""
        return self.input_ids.shape[0]

    @property
    def text_ids(self) -> torch.Tensor:
        """The prompt without its image placeholders."""
        if not self.images:
            return self.input_ids
        # The images tell how many are left, so the host need not wait for the device.
        count = self.num_tokens - sum(len(features) for features in self.images)
        places = (self.input_ids != self.image_token_id).nonzero_static(size=count)
        return self.input_ids[places[:, 0]]

    def embeddings(self, transformer) -> torch.Tensor:
        """``[T, hidden]`` of the target: text embedded, features in place of the placeholders."""
        embeddings = transformer.embed(self.input_ids)
        if self.images:
            features = torch.cat(self.images).to(embeddings)
            # Assigning to the rows of a mask would make the host wait for the device.
            embeddings.masked_scatter_((self.input_ids == self.image_token_id)[:, None], features)
        return embeddings


def text_stack(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The text model and output projection of a transformers model, multimodal or not."""
    inner = model.model
    return getattr(inner, "language_model", inner), model.lm_head


def is_multimodal(model: object) -> bool:
    """Whether a model is one of the LLaVA-shaped ones that are supported."""
    return getattr(getattr(model, "config", None), "model_type", None) in MULTIMODAL_MODELS


def image_token_id(model: nn.Module) -> int:
    """The placeholder id of a LLaVA-shaped model."""
    config = model.config
    token_id = getattr(config, "image_token_id", None)
    return config.image_token_index if token_id is None else token_id


def check_pixel_values(model: nn.Module, pixel_values: torch.Tensor, name: str = "pixel_values") -> None:
    """Raises before the vision tower runs where the images cannot be the processor's.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: for a wrong rank, number of channels or size; the message gives both shapes.
    """
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {_describe(pixel_values)}; "
            "pass what the model's processor returns"
        )
    size = getattr(getattr(model.config, "vision_config", None), "image_size", None)
    if model.config.model_type in ("llava", "vipllava") and isinstance(size, int):
        # Only a tower with learned positions is bound to one size.
        bound = getattr(model.config.vision_config, "model_type", "") == "clip_vision_model"
        expected = f"[images, 3, {size}, {size}]" if bound else "[images, 3, height, width]"
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or (bound and shape[2:] != (size, size)):
            raise ValueError(f"{name} must have shape {expected}, got {list(shape)}")


def encode_images(model: nn.Module, images: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Image features by transformers' own vision tower and projector.

    Args:
        model: a LLaVA-shaped model.
        images: ``pixel_values`` and what belongs to them (``image_sizes``, ...).

    Returns:
        One ``[T_i, hidden]`` tensor per image.

    Raises:
        ValueError: for an argument that the model's encoder does not take.
    """
    encode = model.model.get_image_features
    unknown = sorted(set(images) - set(inspect.signature(encode).parameters))
    if unknown:
        raise ValueError(f"{model.config.model_type} does not take these arguments: {', '.join(unknown)}")
    pixel_values = images["pixel_values"].to(model.device)

    @torch.no_grad()
    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(encode(**{**images, "pixel_values": pixels}, return_dict=True).pooler_output)

    straight = model.config.model_type in ("llava", "vipllava") and len(images) == 1
    if straight and pixel_values.is_cuda:
        return _graphs(model, run, pixel_values)
    return run(pixel_values)


def deal_images(placeholder_counts: list[int], images: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    """Which images belong to which prompt: each takes the next ones until its placeholders are filled.

    Args:
        placeholder_counts: image placeholders in each prompt.
        images: features of all images of the batch, in order.

    Returns:
        Half-open ranges of images, one per prompt.

    Raises:
        ValueError: if placeholders and features do not match; the message names the prompt and the counts.
    """
    ranges, taken = [], 0
    for row, expected in enumerate(placeholder_counts):
        start, filled = taken, 0
        while filled < expected and taken < len(images):
            filled += images[taken].shape[0]
            taken += 1
        if filled != expected:
            per_image = sorted({image.shape[0] for image in images})
            raise ValueError(
                f"prompt {row} has {expected} image placeholders, which its images do not fill: "
                f"{len(images)} images for the batch with {per_image} features each"
            )
        ranges.append((start, taken))
    if taken != len(images):
        raise ValueError(f"{len(images)} images were passed but the prompts have placeholders for {taken}")
    return ranges


def _describe(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, torch.Tensor) else type(value).__name__
