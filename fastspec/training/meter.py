"""How fast a training goes: tokens per second, what that makes of the device, and its memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastspec.model.vision import text_stack


class Meter(TrainerCallback):
    """Counts the draft's tokens and the seconds of optimizer steps, evaluation and saving apart.

    The first step, which pays for what is done once, is not counted.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._tokens: Tensor | None = None
        self._pending: Tensor | None = None
        self._begin = 0.0

    def count(self, attention_mask: Tensor) -> None:
        """Told of each batch; nothing waits for the device."""
        tokens = attention_mask.sum()
        self._pending = tokens if self._pending is None else self._pending + tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin, self._pending = time.perf_counter(), None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Trainer has looked at the loss: the device is no more than an optimizer's step behind.
        self.steps += 1
        if self.steps > 1 and self._pending is not None:
            self.seconds += time.perf_counter() - self._begin
            self._tokens = self._pending if self._tokens is None else self._tokens + self._pending

    def summary(self, draft: nn.Module, processes: int) -> dict[str, float | None]:
        """Rates of all processes together, ready for JSON; None where fewer than two steps were taken.

        Args:
            draft: what was trained; a token costs six operations per weight of its matrices, attention apart.
            processes: that share the work evenly.
        """
        rate = None if self._tokens is None else processes * self._tokens.item() / self.seconds
        weights = sum(parameter.numel() for parameter in nn.ModuleList(text_stack(draft)).parameters())
        if text_stack(draft)[1].weight is not text_stack(draft)[0].embed_tokens.weight:
            weights -= text_stack(draft)[0].embed_tokens.weight.numel()
        on_gpu = next(draft.parameters()).is_cuda
        return {
            "tokens_per_second": rate,
            "operations_per_second": None if rate is None else 6 * weights * rate,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
