"""transformers' Trainer with the target in the loop, held-out acceptance, and a stop at the first NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from fastspec.model.vision import text_stack
from fastspec.training.batches import answer_positions
from fastspec.training.checkpoints import last_good_checkpoint
from fastspec.training.losses import Loss, expected_acceptance
from fastspec.training.meter import Meter


class DraftTrainer(Trainer):
    """Trains a draft on the tokens that an assistant says.

    Args:
        loss: from :data:`fastspec.training.losses.LOSSES`.
        loss_needs_target: whether that loss compares with the target's law.
        target: the target, frozen and on the device; None where neither loss nor evaluation asks it.
        meter: told of every batch.
        **arguments: Trainer's own.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        loss_needs_target: bool,
        target: nn.Module | None,
        meter: Meter,
        **arguments: Any,
    ):
        super().__init__(compute_metrics=_held_out_metrics, **arguments)
        self._loss, self._loss_needs_target, self._target = loss, loss_needs_target, target
        self._meter = meter
        self.add_callback(meter)
        # Makes Trainer count the tokens of all accumulated batches and processes, by which the loss is divided.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        draft_logits, answers, _ = self._draft_logits(model, inputs)
        target_logits = self.target_logits(inputs["target"]) if self._loss_needs_target else None
        total = self._loss(draft_logits, target_logits, answers).sum()
        if num_items_in_batch is None:
            num_items_in_batch = len(answers)
        count = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        # The count is that of all processes, and their gradients will be averaged.
        return total * self.accelerator.num_processes / count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *counts: Any, **more: Any) -> Tensor:
        self._meter.count(inputs["attention_mask"])
        loss = super().training_step(model, inputs, *counts, **more)
        if not torch.isfinite(loss):
            self._stop(f"the loss is {loss.item()}", 1)
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A finite loss may have a gradient that is not: the weights show it before the next loss does.
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            self._stop("weights are NaN or infinite")
        super()._save_checkpoint(model, trial)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of loss and expected acceptance over each row, and how many tokens they are of."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            draft_logits, answers, rows = self._draft_logits(model, inputs)
            target_logits = self.target_logits(inputs["target"])
            losses = self._loss(draft_logits, target_logits, answers).float()
            accepted = expected_acceptance(draft_logits, target_logits)
        values = torch.stack([losses, accepted, torch.ones_like(accepted)], 1)
        sums = values.new_zeros(len(inputs["input_ids"]), 3).index_add_(0, rows, values)
        return None, sums[:, :2], sums[:, 2]

    def target_logits(self, inputs: dict[str, Any]) -> Tensor:
        """``[M, V]`` of the target, which sees the image, where an answer's token comes next."""
        inputs = dict(inputs)
        mask, _ = answer_positions(inputs.pop("labels"))
        with torch.no_grad():
            hidden = self._target.model(**inputs, use_cache=False).last_hidden_state
            return text_stack(self._target)[1](hidden[:, :-1][mask])

    def _draft_logits(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """``[M, V]`` of the draft, the answers' tokens ``[M]``, and the rows they are of."""
        seen = {name: value for name, value in inputs.items() if name not in ("target", "labels")}
        mask, answers = answer_positions(inputs["labels"])
        logits = model(**seen, use_cache=False).logits
        return logits[:, :-1][mask], answers, mask.nonzero()[:, 0]

    def _stop(self, what: str, steps_ahead: int = 0) -> None:
        checkpoint = last_good_checkpoint(Path(self.args.output_dir))
        raise FloatingPointError(
            f"{what} at step {self.state.global_step + steps_ahead}; the last good checkpoint is "
            f"{checkpoint or 'none, for none was saved yet'}; try a lower --learning-rate"
        )


def _held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all held-out tokens."""
    sums, counts = prediction.predictions.sum(0), prediction.label_ids.sum()
    return {"loss": float(sums[0] / counts), "expected_acceptance": float(sums[1] / counts)}
