"""How fast a training goes: tokens per second, what that makes of the device, and its memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastspec.model.vision import text_stack


class Meter(TrainerCallback):
    """Counts the draft's tokens and the seconds of optimizer steps with their data, evaluation and saving apart.

    The first step, which pays for what is done once, is not counted.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._tokens: Tensor | None = None
        self._pending: Tensor | None = None
        self._begin: float | None = None

    def count(self, attention_mask: Tensor) -> None:
        """Told of each batch; nothing waits for the device."""
        tokens = attention_mask.sum()
        self._pending = tokens if self._pending is None else self._pending + tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Within a stretch of steps the device may lag behind; what ends or begins one waits for it.
        paused = control.should_evaluate or control.should_save or control.should_training_stop
        if (paused or self._begin is None) and args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        now = time.perf_counter()
        if self._begin is not None and self._pending is not None:
            self.seconds += now - self._begin
            self._tokens = self._pending if self._tokens is None else self._tokens + self._pending
        self._begin, self._pending = now, None
        self.steps += 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resume()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resume()

    def _resume(self) -> None:
        if self._begin is not None:  # before the first step there is evaluation, too
            self._begin = time.perf_counter()

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
