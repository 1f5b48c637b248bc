"""transformers' Trainer with the target in the loop, held-out acceptance, and a stop at the first NaN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from fastspec.lines import BadLines
from fastspec.model.vision import text_stack
from fastspec.training.checkpoints import last_good_checkpoint
from fastspec.training.losses import Loss, expected_acceptance
from fastspec.training.meter import Meter

#: Held-out positions whose laws are compared at a time: two float32 laws of 32,000 tokens are 1 GB.
EVALUATED_TOGETHER = 4096
#: Parts of a batch that are no inputs of the draft.
_BESIDE = ("target", "labels", "places", "answers")


class _FinishedError(Exception):
    """All steps were taken before."""


class _EndAtOnce(TrainerCallback):
    """Keeps Trainer, which looks at the count after a step, from one step more whenever a finished run is resumed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step:
            raise _FinishedError


class DraftTrainer(Trainer):
    """Trains a draft on the tokens that an assistant says.

    Args:
        loss: from :data:`fastspec.training.losses.LOSSES`.
        loss_needs_target: whether that loss compares with the target's law.
        target: the target, frozen and on the device; None where neither loss nor evaluation asks it.
        meter: told of every batch.
        bad: told of lines that turn out bad when they are encoded.
        **arguments: Trainer's own.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        loss_needs_target: bool,
        target: nn.Module | None,
        meter: Meter,
        bad: BadLines,
        **arguments: Any,
    ):
        super().__init__(compute_metrics=_held_out_metrics, **arguments)
        self._loss, self._loss_needs_target, self._target = loss, loss_needs_target, target
        self._meter, self._bad = meter, bad
        #: Tokens that were learned from by this process.
        self.num_answers = 0
        self.add_callback(meter)
        self.add_callback(_EndAtOnce)
        # Makes Trainer count the tokens of all accumulated batches and processes, by which the loss is divided.
        self.model_accepts_loss_kwargs = True
        self._head = text_stack(self.model)[1]
        self._hidden: Tensor | None = None
        self.model.model.register_forward_hook(self._keep_hidden)
        self._watched: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        draft_logits = self._draft_logits(self._draft_hidden(model, inputs))
        target_logits = None
        if self._loss_needs_target:
            target_logits = self._target_logits(self._target_hidden(inputs["target"]))
        answers = inputs["answers"]
        self.num_answers += len(answers)
        total = self._loss(draft_logits, target_logits, answers).sum()
        if num_items_in_batch is None:
            num_items_in_batch = len(answers)
        count = torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
        # The count is that of all processes, and their gradients will be averaged.
        return total * self.accelerator.num_processes / count

    def train(self, *arguments: Any, **more: Any) -> Any:
        try:
            result = super().train(*arguments, **more)
        except _FinishedError:
            return None
        self._look()
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *counts: Any, **more: Any) -> Tensor:
        self._count_faults(inputs)
        self._meter.count(inputs["attention_mask"])
        loss = super().training_step(model, inputs, *counts, **more)
        self._look()
        self._watch(loss)
        return loss

    def _watch(self, loss: Tensor) -> None:
        """Has a loss looked at: at once on a CPU; on a GPU, still busy with it, when the next step is queued."""
        step, event = self.state.global_step + 1, None
        value = loss.detach()
        if value.is_cuda:
            value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._watched = step, value, event
        if event is None:
            self._look()

    def _look(self) -> None:
        """Ends the run if the loss that is watched is NaN or infinite."""
        if self._watched is None:
            return
        (step, value, event), self._watched = self._watched, None
        if event is not None:
            event.synchronize()
        if not math.isfinite(value):
            self._stop(f"the loss is {value.item()}", step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._look()
        # A finite loss may have a gradient that is not: the weights show it before the next loss does.
        if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
            self._stop("weights are NaN or infinite", self.state.global_step)
        step = self.state.global_step
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk each library has its own
            raise OSError(f"cannot save step {step}: {error}; {self._last_good()}") from error

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Sums of loss and expected acceptance over each row, and how many tokens they are of."""
        self._count_faults(inputs)
        inputs = self._prepare_inputs(inputs)
        values = []
        with torch.no_grad():
            hidden = self._draft_hidden(model, inputs), self._target_hidden(inputs["target"])
            for ours, theirs, answers in zip(
                *(part.split(EVALUATED_TOGETHER) for part in (*hidden, inputs["answers"])), strict=True
            ):
                draft_logits, target_logits = self._draft_logits(ours), self._target_logits(theirs)
                losses = self._loss(draft_logits, target_logits, answers).float()
                accepted = expected_acceptance(draft_logits, target_logits)
                values.append(torch.stack([losses, accepted, torch.ones_like(accepted)], 1))
        batch, length = inputs["input_ids"].shape
        rows = inputs["places"] // length
        sums = values[0].new_zeros(batch, 3).index_add_(0, rows, torch.cat(values))
        return None, sums[:, :2], sums[:, 2]

    def _draft_hidden(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """``[M, hidden]`` of the draft, before its output projection.

        Projecting only what is asked, and not through the model, saves time and memory: logits of all places are as
        large as everything else together, and accelerate would copy them to float32.
        """
        seen = {name: value for name, value in inputs.items() if name not in _BESIDE}
        model(**seen, use_cache=False, logits_to_keep=1)
        hidden, self._hidden = self._hidden, None
        return hidden.flatten(0, 1)[inputs["places"]]

    def _keep_hidden(self, model: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if torch.is_grad_enabled() and not hidden.requires_grad:
            # An adapter learns alone and the batch has no picture: a gradient of zero, for processes to share.
            learned = (weights for weights in self.model.parameters() if weights.requires_grad)
            hidden = output.last_hidden_state = hidden + 0 * sum(weights.sum() for weights in learned)
        self._hidden = hidden

    def _draft_logits(self, hidden: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return self._head(hidden)

    def _target_hidden(self, inputs: dict[str, Any]) -> Tensor:
        """``[M, hidden]`` of the target, which sees the image, where an answer's token comes next."""
        seen = {name: value for name, value in inputs.items() if name not in _BESIDE}
        with torch.no_grad():
            hidden = self._target.model(**seen, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[inputs["places"]]

    def _target_logits(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return text_stack(self._target)[1](hidden)

    def _count_faults(self, inputs: dict[str, Any]) -> None:
        for fault in inputs.pop("faults", ()):
            self._bad.report(fault)

    def _stop(self, what: str, step: int) -> None:
        raise FloatingPointError(f"{what} at step {step}; {self._last_good()}; try a lower --learning-rate")

    def _last_good(self) -> str:
        checkpoint = last_good_checkpoint(Path(self.args.output_dir))
        return f"the last good checkpoint is {checkpoint or 'none, for none was saved yet'}"


def _held_out_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Means over all held-out tokens; nothing where every held-out line turned out bad."""
    sums, counts = prediction.predictions.sum(0), prediction.label_ids.sum()
    if not counts:
        return {}
    return {"loss": float(sums[0] / counts), "expected_acceptance": float(sums[1] / counts)}
