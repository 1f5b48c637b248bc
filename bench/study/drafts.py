"""The drafts that the study compares: those that come along, those that are trained for it, and compact ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random

from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from fastspec import miniature
from fastspec.draft.sharing import share_vision_tower
from fastspec.miniature import train
from fastspec.miniature.language import TASKS, Example
from fastspec.runs import Run
from fastspec.training.distill import Distillation, distill
from fastspec.training.shrink import Shrinking, shrink

#: Tokens that the reduced drafts can propose, of 1024.
VOCABULARIES = (256, 128)
#: Pictures whose answers say which tokens are frequent.
COUNTED_PICTURES = 200


def image_drafts(out: Path, length: list[str]) -> Path:
    """The folder of ``draft-image`` and its text-only twin: the package's, or one under ``out``, made if it is missing.

    Args:
        out: the study's folder.
        length: how long training may take, as arguments of ``python -m fastspec.miniature.train``.

    Raises:
        ValueError: for an image draft that was trained for another target.
    """
    for folder in (miniature.WEIGHTS, out / "weights"):
        if all((folder / name / "config.json").is_file() for name in ("draft-image", "draft-twin")):
            break
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("target", "draft-ft"):
            shutil.copytree(miniature.WEIGHTS / name, folder / name, dirs_exist_ok=True)
        train.main(["--out", str(folder), "--stage", "image", "--seed", "0", *length])
    draft = LlavaForConditionalGeneration.from_pretrained(folder / "draft-image")
    if not share_vision_tower(miniature.load_target(), draft):
        raise ValueError(f"{folder / 'draft-image'} was trained for another target: remove {folder}")
    return folder


def compact_drafts(out: Path, pictures: int = COUNTED_PICTURES) -> dict[str, Path]:
    """Compact copies of the ft draft, by name; they keep the tokens that are most frequent in the target's answers."""
    answers = _answers(out, pictures)
    made = {}
    for size, weights in [(size, "full") for size in VOCABULARIES] + [
        (None, "int8"),
        (VOCABULARIES[0], "int8"),
    ]:
        name = "-".join(["ft", *([str(size)] if size else []), *(["int8"] if weights == "int8" else [])])
        made[name] = out / "compact" / name
        counted = (answers,) if size else ()
        shrink(Shrinking("miniature:ft", made[name], counted, size, weights))
    return made


def coverage(draft: Path, runs: Iterable[Run]) -> float:
    """The share of the tokens of answers that a compact draft can propose."""
    kept = set(AutoModelForCausalLM.from_pretrained(draft).lm_head.kept_ids.tolist())
    tokens = [token for run in runs for token in run.token_ids]
    return sum(token in kept for token in tokens) / len(tokens)


def _answers(out: Path, pictures: int) -> Path:
    """What the target says of pictures that are in no evaluation, one question of each task about each."""
    images, questions = out / "pictures", []
    images.mkdir(parents=True, exist_ok=True)
    rng = Random("study answers")
    for number in range(pictures):
        example = Example.random(TASKS[number % len(TASKS)], rng)
        example.scene.render().save(images / f"{number}.png")
        questions.append((f"{number}.png", example.turns[0][0]))
    prompts = out / "questions.jsonl"
    write_questions(prompts, questions)
    answers = out / "answers.jsonl"
    distill(
        Distillation(
            "miniature",
            images,
            prompts,
            answers,
            draft="miniature",
            temperatures=(0.0, 1.0),
            max_new_tokens=128,
        )
    )
    return answers


def write_questions(path: Path, questions: list[tuple[str, str]]) -> None:
    """Questions about images as chats in the LLaVA format; a resumed study writes the same bytes."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "image": image,
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}"},
                        {"from": "gpt", "value": "?"},
                    ],
                }
            )
            + "\n"
            for image, question in questions
        )
    )
