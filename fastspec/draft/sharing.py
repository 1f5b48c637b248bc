"""One vision tower for the target and an image draft: held once, run once for each image."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from fastspec.model.vision import encode_images
from fastspec.runtime.encoder_graphs import EncoderGraphs


class _Seen(NamedTuple):
    pixels: torch.Tensor
    state: tuple
    features: torch.Tensor


class SharedTower:
    """A vision tower that several LLaVAs read, each through a projector of its own; it remembers its last images."""

    def __init__(self) -> None:
        self._last: _Seen | None = None
        self._graphs = EncoderGraphs()

    def __reduce__(self) -> tuple:
        return SharedTower, ()  # a copy of the model, or a pickle, remembers nothing

    @torch.no_grad()
    def encode(
        self, model: nn.Module, pixel_values: torch.Tensor, look_back: bool
    ) -> tuple[torch.Tensor, ...]:
        """A model's features of images, one ``[T, hidden]`` tensor each.

        Args:
            model: one of the LLaVAs that read the tower.
            pixel_values: ``[n, 3, height, width]``.
            look_back: whether only the model's projector shall run if the images are those of the last call, or a part
                of them.
        """
        state = (_version(pixel_values), *_weights(model.model.vision_tower))
        features = _remembered(self._last, pixel_values, state) if look_back else None
        if features is None:
            features = self._run(model, pixel_values.to(model.device))
            self._last = _Seen(pixel_values, state, features)
        return tuple(model.model.multi_modal_projector(features))

    def _run(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        if not pixels.is_cuda:
            return _tower_features(model, pixels)
        return self._graphs(model.model.vision_tower, lambda some: (_tower_features(model, some),), pixels)[0]


def share_vision_tower(target: nn.Module, draft: nn.Module) -> bool:
    """Lets an image draft whose vision tower is a copy of the target's use the target's own.

    The draft's copy is let go. Nothing happens where the towers differ in any weight, their precision or the features
    that are taken from them.

    Returns:
        Whether the tower is shared.
    """
    if target.config.model_type != "llava" or draft.config.model_type != "llava":
        return False
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if getattr(target.config, name) != getattr(draft.config, name):
            return False
    tower = target.model.vision_tower
    if draft.model.vision_tower is not tower:
        if not _equal(tower, draft.model.vision_tower):
            return False
        draft.model.vision_tower = tower
    if not hasattr(tower, "shared"):
        tower.shared = SharedTower()
    return True


def encode_shared(
    model: nn.Module, images: dict[str, Any], look_back: bool = False
) -> tuple[torch.Tensor, ...]:
    """:func:`fastspec.model.vision.encode_images`, by the tower that a model shares with another, if it does.

    A target encodes; its draft looks back at what was encoded.
    """
    shared = getattr(getattr(model.model, "vision_tower", None), "shared", None)
    if shared is None or images.keys() != {"pixel_values"}:
        return encode_images(model, images)
    return shared.encode(model, images["pixel_values"], look_back)


def _tower_features(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """``[n, T, width]`` as transformers hands them to the projector, before any pooling."""
    reader = copy.copy(model.model)
    reader._modules = model.model._modules | {"multi_modal_projector": nn.Identity()}
    return torch.stack(tuple(reader.get_image_features(pixels, return_dict=True).pooler_output))


def _remembered(last: _Seen | None, pixels: torch.Tensor, state: tuple) -> torch.Tensor | None:
    """The features of images that are views of the very tensor that was encoded last, if nothing has changed."""
    if last is None or state != last.state or state[0] is None or last.pixels.dtype != pixels.dtype:
        return None
    whole = last.pixels
    same_storage = whole.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()
    if not same_storage or whole.stride() != pixels.stride() or whole.shape[1:] != pixels.shape[1:]:
        return None
    first, rest = divmod(pixels.storage_offset() - whole.storage_offset(), max(1, whole.stride(0)))
    if rest or first < 0 or first + len(pixels) > len(whole):
        return None
    return last.features[first : first + len(pixels)]


def _weights(tower: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """Where the weights are and how often they changed: differs after a step of training."""
    return tuple((parameter.data_ptr(), _version(parameter)) for parameter in tower.parameters())


def _version(tensor: torch.Tensor) -> int | None:
    """Counts changes in place, which views share; unknown for tensors made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape
        and weight.dtype == theirs[name].dtype
        and weight.device == theirs[name].device
        and torch.equal(weight, theirs[name])
        for name, weight in ours.items()
    )
