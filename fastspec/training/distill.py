"""What ``fastspec distill-data`` does: the target's own answers, as chats to train a draft on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastspec import generation
from fastspec.command import DTYPES, load_draft, load_target
from fastspec.decoder import MAX_BATCH_SIZE, check_target
from fastspec.images import load_image
from fastspec.lines import BadLines, DataError, read_lines
from fastspec.state import FinishReason
from fastspec.training.answers import AnswerFile
from fastspec.training.chats import IMAGE_TAG, Chat, Turn, missing_image, parse_chat
from fastspec.training.template import prompt_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Distillation:
    """Everything that ``fastspec distill-data`` asks for.

    Attributes:
        target: a LLaVA checkpoint, or ``miniature``.
        images: the folder of images.
        prompts: a text file, whose every line is asked about every image, or chats (``.jsonl``), whose first
            question is asked about their own images.
        out: the file to write.
        temperatures: each prompt is answered once at each.
        skip_bad_lines: counts bad lines and images instead of ending.
    """

    target: str
    images: Path
    prompts: Path
    out: Path
    draft: str = "ngram"
    temperatures: tuple[float, ...] = (0.0,)
    gamma: int = 5
    max_new_tokens: int = 256
    batch_size: int = 1
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"
    skip_bad_lines: bool = False


@dataclass(frozen=True)
class Question:
    """One answer to be had."""

    line: int
    chat: Chat
    temperature: float

    @property
    def id(self) -> str:
        return f"{','.join(self.chat.images)}#{self.line}@{self.temperature:g}"

    def seed(self, seed: int) -> int:
        """The same whatever was answered before, so that a resumed run draws what it would have drawn."""
        return int.from_bytes(hashlib.sha256(f"{seed} {self.id}".encode()).digest()[:7])


def distill(asked: Distillation) -> dict[str, Any]:
    """Writes the answers that are not in the file yet; returns counts, ready for JSON.

    Raises:
        TypeError: for a target that is no LLaVA.
        ValueError: for arguments, files or checkpoints that cannot be used.
    """
    if asked.dtype != "auto" and asked.dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {asked.dtype!r}")
    if not 1 <= asked.batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"batch_size must be 1 to {MAX_BATCH_SIZE}, got {asked.batch_size}")
    if len(set(asked.temperatures)) != len(asked.temperatures):
        raise ValueError(f"every temperature may be given once, got {list(asked.temperatures)}")
    bad = BadLines(asked.skip_bad_lines)
    chats = list(read_questions(asked, bad))
    if not chats:
        raise ValueError(f"{asked.prompts} has no prompt to ask")
    questions = [Question(line, chat, heat) for heat in asked.temperatures for line, chat in chats]
    with AnswerFile(asked.out, _arguments(asked)) as answers:
        left = [question for question in questions if question.id not in answers.done]
        tally = {"answers": len(questions) - len(left), "new": 0, "tokens": 0, "target_passes": 0}
        if left:
            _answer_all(asked, left, answers, bad, tally)
    return tally | {"out": str(asked.out), "skipped": len(bad), "note": bad.summary()}


def read_questions(asked: Distillation, bad: BadLines) -> Iterator[tuple[int, Chat]]:
    """Line numbers and the first questions, each with its images."""
    if not asked.images.is_dir():
        raise ValueError(f"folder of images not found: {asked.images}")
    if asked.prompts.suffix == ".jsonl":
        for line in read_lines(asked.prompts, bad):
            try:
                chat = parse_chat(line)
                first = next(turn for turn in chat.turns if turn.role == "user")
                chat = Chat((first,), chat.images[: first.num_images])
                if missing := missing_image(asked.images, chat):
                    raise line.error(f"no image {missing!r} in {asked.images}")
            except DataError as error:
                bad.report(error)
                continue
            yield line.number, chat
        return
    names = _image_names(asked.images)
    if not names:
        raise ValueError(f"no {', '.join(IMAGE_SUFFIXES)} file in {asked.images}")
    lines = [line for line in read_lines(asked.prompts, bad) if line.text.strip()]
    for name in names:
        for line in lines:
            yield line.number, Chat((Turn("user", line.text.replace(IMAGE_TAG, "").strip(), 1),), (name,))


def _answer_all(
    asked: Distillation, left: list[Question], answers: AnswerFile, bad: BadLines, tally: dict[str, Any]
) -> None:
    processor, target = load_target(asked)
    check_target(target)
    draft, draft_tokenizer = load_draft(asked)
    with tqdm(total=tally["answers"] + len(left), initial=tally["answers"], unit="answer") as bar:
        for batch in _batches(left, asked.batch_size):
            readable = [
                (question, pictures)
                for question in batch
                if (pictures := _open(asked, question, bad)) is not None
            ]
            inputs, fitting = _inputs(asked, processor, target, readable, bad)
            if fitting:
                records = _answer(asked, processor, target, draft, draft_tokenizer, fitting, inputs, tally)
                answers.append(records)
                tally["answers"] += len(records)
                tally["new"] += len(records)
            bar.update(len(batch))


def _open(asked: Distillation, question: Question, bad: BadLines) -> list[Any] | None:
    """The question's pictures; None if one cannot be read and bad ones are skipped."""
    try:
        return [load_image(asked.images / name) for name in question.chat.images]
    except ValueError as error:
        bad.report(DataError(asked.prompts, question.line, str(error)))
        return None


def _inputs(
    asked: Distillation,
    processor: Any,
    target: nn.Module,
    batch: list[tuple[Question, list[Any]]],
    bad: BadLines,
) -> tuple[Any, list[Question]]:
    """The processor's tensors of the questions that are within the target's reach, and those questions."""
    if not batch:
        return None, []
    inputs = processor(
        images=[picture for _, pictures in batch for picture in pictures] or None,
        text=[prompt_text(processor, question.chat.messages) for question, _ in batch],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    limit = target.config.get_text_config().max_position_embeddings
    fitting = []
    for one, length in zip(batch, inputs["attention_mask"].sum(1).tolist(), strict=True):
        if length + asked.max_new_tokens <= limit:
            fitting.append(one)
            continue
        reason = (
            f"the prompt has {length} tokens, which with {asked.max_new_tokens} new ones are more than the "
            f"target's max_position_embeddings of {limit}"
        )
        bad.report(DataError(asked.prompts, one[0].line, reason))
    if len(fitting) < len(batch):
        return _inputs(asked, processor, target, fitting, bad)
    return inputs.to(asked.device), [question for question, _ in batch]


def _answer(
    asked: Distillation,
    processor: Any,
    target: nn.Module,
    draft: Any,
    draft_tokenizer: Any,
    batch: list[Question],
    inputs: Any,
    tally: dict[str, Any],
) -> list[dict[str, Any]]:
    """Answers questions of one temperature together."""
    temperature = batch[0].temperature
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = generation.generate(
        target,
        draft=draft,
        gamma=asked.gamma,
        seed=[question.seed(asked.seed) for question in batch],
        tokenizer=processor.tokenizer,
        draft_tokenizer=draft_tokenizer,
        **inputs,
        **(sampling if temperature > 0 else {"do_sample": False}),
        max_new_tokens=asked.max_new_tokens,
        return_dict_in_generate=True,
    )
    record = output.speculation
    tally["target_passes"] += record.target_passes + len(batch)
    ends = torch.as_tensor(target.generation_config.eos_token_id or []).flatten().tolist()
    records = []
    for question, row, reason in zip(batch, output.sequences, record.finish_reasons, strict=True):
        if reason == FinishReason.INVALID_LOGITS:
            raise ValueError(f"the target's logits were NaN or infinite at {question.id}")
        tokens = row[inputs["input_ids"].shape[1] :].tolist()
        if reason == FinishReason.EOS:
            tokens = tokens[: next(i for i, token in enumerate(tokens) if token in ends) + 1]
        tally["tokens"] += len(tokens)
        records.append(_record(question, tokens, processor.tokenizer, reason))
    return records


def _record(question: Question, tokens: list[int], tokenizer: Any, reason: FinishReason) -> dict[str, Any]:
    asked, images = question.chat.turns[0], question.chat.images
    record: dict[str, Any] = {"id": question.id}
    if images:
        record["image"] = images[0] if len(images) == 1 else list(images)
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return record | {
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TAG}\n" * asked.num_images + asked.text},
            {"from": "gpt", "value": text, "token_ids": tokens},
        ],
        "temperature": question.temperature,
        "finish_reason": reason.name.lower(),
    }


def _batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """In order, each of one temperature."""
    batch: list[Question] = []
    for question in questions:
        if batch and (len(batch) == size or question.temperature != batch[0].temperature):
            yield batch
            batch = []
        batch.append(question)
    yield batch


def _image_names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )


def _arguments(asked: Distillation) -> dict[str, Any]:
    """What the answers depend on; names as on the command line."""

    def checkpoint(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    listing = [(name, (asked.images / name).stat().st_size) for name in _image_names(asked.images)]
    return {
        "target": checkpoint(asked.target),
        "draft": checkpoint(asked.draft),
        "images": hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16],
        "prompts": hashlib.sha256(asked.prompts.read_bytes()).hexdigest()[:16],
        "temperature": list(asked.temperatures),
        "gamma": asked.gamma,
        "max_new_tokens": asked.max_new_tokens,
        "seed": asked.seed,
        "dtype": asked.dtype,
    }
