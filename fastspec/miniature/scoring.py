"""How well a target answers about held-out scenes, and how well a draft foresees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from . import sample_example
from .language import TASKS, Example
from .reading import judge
from .stream import drop_image
from .tokens import EOS, PAD, prompt_text


@dataclass
class TaskScore:
    """`right` of `total` answers; `parts` has (right, total) by kind of question or by attribute."""

    right: int = 0
    total: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.right / max(1, self.total)

    def add(self, right: bool) -> None:
        self.right += right
        self.total += 1

    def add_part(self, name: str, right: int, total: int = 1) -> None:
        before = self.parts.get(name, (0, 0))
        self.parts[name] = (before[0] + right, before[1] + total)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {right / max(1, total):.1%}" for name, (right, total) in sorted(self.parts.items())
        )
        return f"{self.share:.1%} of {self.total}" + (f" ({parts})" if parts else "")

    def record(self) -> dict:
        return {"share": round(self.share, 4), **asdict(self)}


@torch.inference_mode()
def answer_ids(
    model, processor, images: Sequence, texts: Sequence[str], batch: int = 128, **options: object
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids with their `</s>`) by plain `generate`, greedy unless the options say otherwise."""
    options = {"max_new_tokens": 220, "do_sample": False, **options}
    pairs = []
    for start in range(0, len(texts), batch):
        some = slice(start, start + batch)
        inputs = processor(
            images=list(images[some]), text=list(texts[some]), padding=True, return_tensors="pt"
        )
        inputs = inputs.to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        width = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, **options).tolist()
        for row, mask in zip(output, inputs["attention_mask"].tolist(), strict=True):
            new = row[width:]
            new = new[: new.index(EOS) + 1] if EOS in new else new
            pairs.append((row[mask.index(1) : width], new))
    return pairs


def _texts(processor, pairs: list[tuple[list[int], list[int]]]) -> list[str]:
    return [
        text.strip() for text in processor.batch_decode([new for _, new in pairs], skip_special_tokens=True)
    ]


def held_out(task: str, count: int, start: int = 0) -> list[Example]:
    return [sample_example(task, seed) for seed in range(start, start + count)]


def score_captions(
    target, processor, examples: Sequence[Example], batch: int = 128, **options: object
) -> TaskScore:
    """A caption is right when every object, its colour and its place are, and nothing is invented."""
    score = TaskScore()
    images = [example.scene.render() for example in examples]
    texts = [prompt_text(example.turns) for example in examples]
    answers = _texts(processor, answer_ids(target, processor, images, texts, batch, **options))
    for example, text in zip(examples, answers, strict=True):
        verdict = judge(text, example.scene)
        score.add(verdict.right)
        score.add_part("every stated detail", verdict.flawless)
        score.add_part(f"with {len(example.scene.things)} objects", verdict.right)
        for name, (right, total) in verdict.shares.items():
            score.add_part(name, right, total)
    return score


def score_conversations(
    target, processor, examples: Sequence[Example], batch: int = 128, **options: object
) -> TaskScore:
    """Each answer's fact; later questions follow the model's own earlier answers."""
    score = TaskScore()
    images = [example.scene.render() for example in examples]
    said: list[list[str]] = [[] for _ in examples]
    for turn in range(max(len(example.turns) for example in examples)):
        rows = [index for index, example in enumerate(examples) if len(example.turns) > turn]
        texts = []
        for index in rows:
            users = [user for user, _ in examples[index].turns]
            texts.append(prompt_text(list(zip(users, [*said[index], ""], strict=False)), turn))
        answers = _texts(
            processor,
            answer_ids(target, processor, [images[index] for index in rows], texts, batch, **options),
        )
        for index, text in zip(rows, answers, strict=True):
            said[index].append(text)
            fact = examples[index].answer[turn]
            right = fact.stated(text, examples[index].scene)
            score.add(right)
            score.add_part(fact.kind, right)
    return score


def score_science(
    target, processor, examples: Sequence[Example], batch: int = 128, **options: object
) -> TaskScore:
    """The letter, after the model's own chain of thought."""
    score = TaskScore()
    images = [example.scene.render() for example in examples]
    texts = [prompt_text(example.turns) for example in examples]
    answers = _texts(processor, answer_ids(target, processor, images, texts, batch, **options))
    for example, text in zip(examples, answers, strict=True):
        score.add(example.answer[0].stated(text, example.scene))
    return score


def score_target(
    target, processor, count: int = 512, batch: int = 128, start: int = 0, **options: object
) -> dict[str, TaskScore]:
    """All three tasks on `count` held-out scenes each."""
    scorers = {"caption": score_captions, "conversation": score_conversations, "science": score_science}
    return {
        task: scorers[task](target, processor, held_out(task, count, start), batch, **options)
        for task in TASKS
    }


@dataclass
class Foresight:
    """How a draft would fare. `agreement`: share of the target's greedy tokens that the draft ranks first.
    `tokens_per_pass`: block efficiency of greedy decoding with chains of five. `overlap`: the mean of
    sum(min(p, q)) along the same texts, the chance that a token sampled from the draft is accepted."""

    agreement: float
    tokens_per_pass: float
    overlap: float


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)


@torch.inference_mode()
def foresight(
    target, drafts: dict, processor, count: int = 96, batch: int = 32, gamma: int = 5, **options: object
) -> dict[str, Foresight]:
    """Each draft against the target's greedy answers to held-out prompts of all three tasks."""
    examples = [sample_example(TASKS[seed % len(TASKS)], 100_000 + seed) for seed in range(count)]
    images = [example.scene.render() for example in examples]
    texts = [prompt_text(example.turns) for example in examples]
    hits: dict[str, list[list[bool]]] = {name: [] for name in drafts}
    overlaps: Counter = Counter()
    tokens = 0
    for start in range(0, count, batch):
        some = slice(start, start + batch)
        pairs = answer_ids(target, processor, images[some], texts[some], batch, **options)
        pixels = processor.image_processor(images[some], return_tensors="pt")["pixel_values"]
        full = _padded([prompt + answer for prompt, answer in pairs], target.device)
        logits = target(input_ids=full, pixel_values=pixels.to(target.device, target.dtype)).logits.float()
        short = _padded([drop_image(prompt) + answer for prompt, answer in pairs], target.device)
        guesses = {name: draft(input_ids=short).logits.float() for name, draft in drafts.items()}
        for row, (prompt, answer) in enumerate(pairs):
            tokens += len(answer)
            at, near = len(prompt) - 1, len(drop_image(prompt)) - 1
            p = logits[row, at : at + len(answer)].softmax(-1)
            true = torch.tensor(answer, device=p.device)
            for name, guess in guesses.items():
                q = guess[row, near : near + len(answer)]
                hits[name].append((q.argmax(-1) == true).tolist())
                overlaps[name] += torch.minimum(p, q.softmax(-1)).sum().item()
    return {
        name: Foresight(
            agreement=sum(map(sum, rows)) / tokens,
            tokens_per_pass=tokens / sum(_passes(row, gamma) for row in rows),
            overlap=overlaps[name] / tokens,
        )
        for name, rows in hits.items()
    }


def _passes(hits: list[bool], gamma: int) -> int:
    """Target passes that greedy speculative decoding needs for an answer with these correct guesses."""
    position = passes = 0
    while position < len(hits):
        accepted = 0
        while accepted < gamma and position + accepted < len(hits) and hits[position + accepted]:
            accepted += 1
        position += accepted + 1
        passes += 1
    return passes
