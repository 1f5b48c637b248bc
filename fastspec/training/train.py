"""What ``fastspec train-draft`` does: data, draft, target and Trainer put together, and the draft saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments, set_seed

from fastspec.lines import BadLines
from fastspec.miniature.models import check_replaceable, count_parameters, replace_folder
from fastspec.model.vision import text_stack
from fastspec.training.arguments import differing_arguments, write_arguments
from fastspec.training.batches import Collator
from fastspec.training.checkpoints import last_good_checkpoint, remove_torn_checkpoints
from fastspec.training.datasets import ChatRows, TextBlocks
from fastspec.training.history import History
from fastspec.training.losses import find_loss
from fastspec.training.meter import Meter
from fastspec.training.pair import Pair, load_pair
from fastspec.training.template import STAGES, check_template
from fastspec.training.trainer import DraftTrainer

#: Of a run folder: what its checkpoints can only be resumed with.
ARGUMENTS = "arguments.json"
#: Of a trained draft's folder: how it was made.
FACTS = "training.json"


@dataclass(frozen=True)
class Training:
    """Everything that ``fastspec train-draft`` asks for.

    Attributes:
        target: a LLaVA checkpoint, or ``miniature``.
        out: the folder of the trained draft; checkpoints and the course of the losses go into ``OUT.run`` beside it.
        data: text files (pretrain) or JSONL chats (instruct, distill).
        draft: a draft to train further; a random one of ``size`` if None.
        image_adapter: whether the draft gets the image too.
        image_pooling: side of the squares of image features that become one token of its.
        train: ``adapter`` for the image adapter alone, or ``all``.
        held_out: examples that are not trained on, for the expected acceptance; 0 leaves it out.
        steps: optimizer steps; 0 for as many as ``epochs`` take.
        compile: whether torch.compile fuses the draft's layers and the loss.
    """

    target: str
    out: Path
    stage: str
    data: tuple[Path, ...]
    draft: str | None = None
    size: str | None = None
    image_adapter: bool = False
    image_pooling: int = 1
    train: str = "all"
    images: Path | None = None
    loss: str = "cross-entropy"
    epochs: float = 1.0
    steps: int = 0
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    max_length: int = 1024
    held_out: int = 64
    log_every: int = 10
    evaluate_every: int = 500
    save_every: int = 500
    workers: int = 0
    seed: int = 0
    device: str | None = None
    skip_bad_lines: bool = False
    resume: bool = False
    compile: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint can only be resumed with, ready for JSON; names as on the command line."""
        return {
            "target": _place(self.target),
            "stage": self.stage,
            "data": [[str(path.resolve()), path.stat().st_size] for path in self.data if path.is_file()],
            "draft": self.draft and _place(self.draft),
            "size": self.size,
            "image-adapter": self.image_adapter,
            "image-pooling": self.image_pooling,
            "train": self.train,
            "loss": self.loss,
            "max-length": self.max_length,
            "held-out": self.held_out,
            "seed": self.seed,
        }

    @property
    def run_folder(self) -> Path:
        return self.out.with_name(self.out.name + ".run")


def train_draft(asked: Training, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Trains and saves a draft; returns what came out, ready for JSON.

    Args:
        asked: what to do.
        callbacks: more of Trainer's, for example to end the training early.

    Raises:
        TypeError: for a target that is no LLaVA.
        ValueError: for arguments, data or checkpoints that cannot be used.
        FloatingPointError: at the first loss that is NaN or infinite; names the step and the last good checkpoint.
    """
    if asked.stage not in STAGES:
        raise ValueError(f"unknown stage {asked.stage!r}; expected one of {', '.join(STAGES)}")
    if asked.stage == "pretrain" and asked.train == "adapter":
        raise ValueError("--train adapter learns from pictures, and --stage pretrain has none")
    loss = find_loss(asked.loss)
    compares = asked.loss != "cross-entropy"
    checkpoint = _resume_point(asked)
    arguments = _trainer_arguments(asked, fresh=checkpoint is None)
    set_seed(asked.seed)  # also for the random draft, which every process must make alike
    pair = load_pair(asked, str(arguments.device), with_target=compares or asked.held_out > 0)

    bad = BadLines(asked.skip_bad_lines)
    train_data, held_out = _split(_open_data(asked, pair, bad), asked.held_out, asked.seed)
    if asked.compile:
        loss = torch.compile(loss)
        for layer in text_stack(pair.draft)[0].layers:
            layer.compile()
    history, meter = History(asked.run_folder, asked.loss), Meter()
    # Batches pad through the processor, which a saved tokenizer would remember.
    companion = copy.deepcopy(pair.processor if pair.draft_sees_images else pair.processor.tokenizer)
    trainer = DraftTrainer(
        loss=loss,
        loss_needs_target=compares,
        target=pair.target,
        meter=meter,
        bad=bad,
        model=pair.draft,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=held_out,
        data_collator=Collator(
            pair.processor,
            pair.image_token_id,
            pair.pad_token_id,
            pair.target is not None,
            pair.draft_sees_images,
            pair.image_pooling,
        ),
        processing_class=companion,
        callbacks=[history, *callbacks],
    )
    if trainer.is_world_process_zero():
        asked.run_folder.mkdir(parents=True, exist_ok=True)
        remove_torn_checkpoints(asked.run_folder)
        if checkpoint is None:
            write_arguments(asked.run_folder / ARGUMENTS, asked.facts)
        history.begin(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = _final_metrics(trainer)
    for messages in gather_object([bad.messages]):
        bad.messages |= messages
    if checkpoint is None and trainer.state.global_step > 0 and not any(gather_object([trainer.num_answers])):
        raise ValueError(f"no line of the data could be learned from; {bad.summary()}")
    result = {
        "out": str(asked.out),
        "parameters": count_parameters(pair.draft),
        "steps": trainer.state.global_step,
        "held_out_loss": metrics.get("eval_loss"),
        "expected_acceptance": metrics.get("eval_expected_acceptance"),
        **meter.summary(trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.num_processes),
        "skipped": len(bad),
        "note": bad.summary(),
    }
    if trainer.is_world_process_zero():
        _save(asked, trainer.accelerator.unwrap_model(trainer.model), companion, result)
    trainer.accelerator.wait_for_everyone()
    return result | {"main_process": trainer.is_world_process_zero()}


def _place(checkpoint: str) -> str:
    return str(Path(checkpoint).resolve()) if Path(checkpoint).is_dir() else checkpoint


def _final_metrics(trainer: DraftTrainer) -> dict[str, float]:
    """The held-out metrics of the last step, evaluated unless they just were."""
    if trainer.eval_dataset is None:
        return {}
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), None)
    return last if last and last["step"] == trainer.state.global_step else trainer.evaluate()


def _resume_point(asked: Training) -> Path | None:
    check_replaceable(asked.out, FACTS)
    checkpoint = last_good_checkpoint(asked.run_folder)
    if asked.resume and checkpoint is None:
        raise ValueError(f"nothing to resume: no complete checkpoint in {asked.run_folder}")
    if checkpoint is not None and not asked.resume:
        raise ValueError(
            f"{asked.run_folder} has checkpoints of another run: pass --resume to go on with it, or remove it"
        )
    arguments = asked.run_folder / ARGUMENTS
    if checkpoint is not None and arguments.is_file():
        for name, (before, now) in differing_arguments(arguments, asked.facts).items():
            raise ValueError(
                f"{asked.run_folder} is of a run with another --{name}: {json.dumps(before)} then, "
                f"{json.dumps(now)} now; resume with what was passed then, or begin anew with another --out"
            )
    return checkpoint


def _trainer_arguments(asked: Training, fresh: bool) -> TrainingArguments:
    on_gpu = torch.cuda.is_available() and asked.device != "cpu"
    evaluates = asked.held_out > 0
    arguments = TrainingArguments(
        output_dir=str(asked.run_folder),
        per_device_train_batch_size=asked.batch_size,
        per_device_eval_batch_size=asked.batch_size,
        gradient_accumulation_steps=asked.gradient_accumulation,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # below 1 it is a share of all steps
        weight_decay=0.05,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        num_train_epochs=asked.epochs,
        max_steps=asked.steps or -1,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        logging_steps=asked.log_every,
        logging_nan_inf_filter=False,  # it would hide what the run must stop for
        eval_strategy="steps" if evaluates else "no",
        eval_steps=asked.evaluate_every,
        # Not trainer.evaluate() before training: it would leave the processes' gradients apart.
        eval_on_start=evaluates and fresh,
        save_steps=asked.save_every,
        save_total_limit=2,
        dataloader_num_workers=asked.workers,
        accelerator_config={"non_blocking": on_gpu},  # else the host waits for the device at every batch
        remove_unused_columns=False,
        label_names=["labels"],
        # A batch without a picture leaves an image draft's projector out.
        ddp_find_unused_parameters=asked.image_adapter or asked.draft is not None,
        average_tokens_across_devices=True,
        report_to="none",
        seed=asked.seed,
    )
    if arguments.n_gpu > 1:
        # One process with several GPUs: Trainer would spread rows over them, but the target is on one.
        arguments._n_gpu = 1
    return arguments


def _open_data(asked: Training, pair: Pair, bad: BadLines) -> Dataset:
    if asked.stage == "pretrain":
        return TextBlocks(
            asked.data, pair.processor.tokenizer, asked.max_length, bad, placeholder=pair.image_token_id
        )
    check_template(pair.processor)
    return ChatRows(
        asked.data,
        pair.processor,
        asked.images,
        distilled=asked.stage == "distill",
        with_images=pair.target is not None or pair.draft_sees_images,
        length=asked.max_length,
        bad=bad,
    )


def _split(data: Dataset, held_out: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training data, and held-out data of at most a tenth; the same for the same seed."""
    if not held_out:
        return data, None
    count = min(held_out, max(1, len(data) // 10))
    if len(data) - count < 1:
        raise ValueError(f"{len(data)} example is too little to hold one out: add data, or pass --held-out 0")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(data, order[count:]), Subset(data, order[:count])


def _save(asked: Training, draft: Any, companion: Any, result: dict[str, Any]) -> None:
    """Puts draft, tokenizer and what was asked into ``out`` in one move: a kill leaves the old folder or the new."""

    def fill(folder: Path) -> None:
        draft.save_pretrained(folder)
        companion.save_pretrained(folder)
        facts = {"arguments": asdict(asked), "result": result}
        (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")

    asked.out.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(asked.out, fill)
