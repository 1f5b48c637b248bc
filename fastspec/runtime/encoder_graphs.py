"""Vision towers as CUDA graphs: hundreds of small launches otherwise keep the GPU waiting."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastspec.runtime.capture import capture

MOST_SHAPES = 4


class _Captured(NamedTuple):
    weights: tuple[int, ...]
    pixel_values: torch.Tensor
    features: tuple[torch.Tensor, ...]
    graph: torch.cuda.CUDAGraph
    free: torch.cuda.Event  # recorded when the last call has read its features


class EncoderGraphs:
    """Image encoders captured per model and shape, from the second call with a shape on.

    Models are not kept alive. A graph is dropped when its model's weights have moved, or four others came after it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._models: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        encode: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        pixel_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The features of ``[images, 3, height, width]`` pixels on the model's GPU, as ``encode`` makes them.

        Args:
            model: whose parameters ``encode`` reads.
            encode: pixels to features, one tensor per image; it must not read values back to the host.
            pixel_values: the images.
        """
        key = (tuple(pixel_values.shape), pixel_values.dtype)
        with self._lock:
            shapes = self._models.setdefault(model, {})
            known = key in shapes
            captured = shapes.pop(key, None)
            shapes[key] = captured  # the last one now
            for oldest in list(shapes)[:-MOST_SHAPES]:
                del shapes[oldest]
            if known:
                return self._run(shapes, key, model, encode, pixel_values)
        return encode(pixel_values)  # once is no habit

    def _run(self, shapes: dict, key: tuple, model: nn.Module, encode: Callable, pixel_values: torch.Tensor):
        weights = tuple(parameter.data_ptr() for parameter in model.parameters())
        captured = shapes[key]
        if captured is None or captured.weights != weights:
            captured = shapes[key] = _capture(encode, pixel_values, weights)
        stream = torch.cuda.current_stream(pixel_values.device)
        stream.wait_event(captured.free)  # another stream may still be at it
        captured.pixel_values.copy_(pixel_values)
        captured.graph.replay()
        features = tuple(one.clone() for one in captured.features)
        captured.free.record(stream)
        return features


def _capture(encode, pixel_values: torch.Tensor, weights: tuple[int, ...]) -> _Captured:
    with torch.inference_mode(False):
        static, features = pixel_values.clone(), []

        def run():
            features[:] = encode(static)

        graph = capture(run, pixel_values.device, "image encoder")
    return _Captured(weights, static, tuple(features), graph, torch.cuda.Event())
