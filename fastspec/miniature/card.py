"""The model card that is written beside the weights."""

from __future__ import annotations

from pathlib import Path

from .language import TASKS

TEXT = """\
# The miniature: a small LLaVA and its drafts

A real `LlavaForConditionalGeneration` that describes drawn scenes, and three text-only LLaMA drafts to decode it
speculatively with. They are a demonstration and a test fixture: they know nothing but these scenes.

| folder | what it is | parameters |
|---|---|---|
| `target` | LLaVA-1.5 in small: CLIP 6 x 192 on 96 x 96 px in patches of 8 (144 image tokens), two-layer projector, \
LLaMA 6 x 256 with heads of 64 | {target_parameters} |
| `draft-base` | LLaMA 2 x 64, pre-trained on the plain texts, no chat format | {draft_parameters} |
| `draft-chat` | `draft-base` tuned on the dialogues | {draft_parameters} |
| `draft-ft` | `draft-chat` tuned on the target's own answers, half greedy, half sampled at temperature 1 | \
{draft_parameters} |
{image_drafts}
The text-only drafts see the prompt without its image tokens. Weights are stored in half precision as safetensors
and load in single precision by plain `from_pretrained`. The vocabulary is a byte-level BPE of 1024 tokens; the
chat template is LLaVA-1.5's.

## Data
Everything is made by `fastspec.miniature`: scenes of one to four objects (10 shapes, 10 colours, 2 sizes, 4
textures, 9 places, 18 backgrounds, jittered) and English text about them in three tasks: captions of one to four
sentences, conversations of two to four turns, and multiple-choice questions answered with a chain of thought.
Wording is drawn at random from a grammar with many plans and synonyms. No outside data, pictures or weights are used.

## Training
`python -m fastspec.miniature.train --out DIR` makes all of it again.

{training}

AdamW, bfloat16 autocast, linear warm-up and cosine decay over the stated time; the loss counts the assistant's tokens
only. The vision tower is first trained alone, in the place of CLIP's pre-training: linear heads on its features name
what covers each patch. They guide the first third of the target's training too, and are thrown away.{resumed}

## Scores
{scores}

## Limits
Pictures unlike the scenes, and questions unlike the three tasks, get fluent nonsense.

## Licence
Apache-2.0, code, data and weights alike.
"""

IMAGE_DRAFTS = """\
| `draft-image` | `draft-ft` with an adapter to the target's vision features, tuned on the target's answers and their \
pictures: a `LlavaForConditionalGeneration` | {image}, the target's vision tower among them |
| `draft-twin` | `draft-ft` tuned on the same answers without their pictures | {twin} |
"""

DETAILS = {
    "caption": "every object with its colour and place right, nothing invented",
    "conversation": "answers with the asked fact right, following the model's own earlier answers",
    "science": "letters right, after the model's own chain of thought",
}


def _millions(log: dict, stage: str) -> str:
    count = log.get(stage, {}).get("parameters")
    return f"{count / 1e6:.2f} M" if count else "not trained"


def _image_drafts(log: dict) -> str:
    if "image" not in log:
        return ""
    return IMAGE_DRAFTS.format(image=_millions(log, "image"), twin=_millions(log, "ft"))


def _training(log: dict) -> str:
    lines = ["| stage | time | device | steps | batch |", "|---|---|---|---|---|"]
    for stage in ("tokenizer", "target", "base", "chat", "ft", "image", "score"):
        if stage in log:
            entry = log[stage]
            cells = (entry.get("device", "CPU"), entry.get("steps", ""), entry.get("batch", ""))
            lines.append(f"| {stage} | {entry['seconds']:.0f} s | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _resumed(log: dict) -> str:
    times = log.get("target", {}).get("resumed", 0)
    if not times:
        return ""
    again = "once" if times == 1 else f"{times} times"
    return f" The target\nwas then trained further {again} on other scenes (`--resume`)."


def _scores(log: dict) -> str:
    if "score" not in log:
        return "Not scored yet."
    entry = log["score"]
    lines = [
        f"On {entry['scenes']} held-out scenes per task, greedy, with the stored weights.",
        "",
        "| task | score | what counts |",
        "|---|---|---|",
    ]
    for task in TASKS:
        one = entry["tasks"][task]
        lines.append(f"| {task} | {one['share']:.1%} of {one['total']} | {DETAILS[task]} |")
    for task in TASKS:
        parts = entry["tasks"][task]["parts"]
        if parts:
            shares = ", ".join(
                f"{name} {right / max(1, total):.1%}" for name, (right, total) in sorted(parts.items())
            )
            lines += ["", f"{task.capitalize()}: {shares}."]
    if entry["drafts"]:
        lines += [
            "",
            "| draft | ranks the target's greedy token first | tokens per target pass, chains of five | "
            "chance that a sampled token is accepted |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {one['agreement']:.1%} | {one['tokens_per_pass']:.2f} | {one['overlap']:.1%} |"
            for name, one in entry["drafts"].items()
        ]
    return "\n".join(lines)


def write_card(folder: Path, log: dict) -> None:
    text = TEXT.format(
        target_parameters=_millions(log, "target"),
        draft_parameters=_millions(log, "base"),
        image_drafts=_image_drafts(log),
        training=_training(log),
        resumed=_resumed(log),
        scores=_scores(log),
    )
    (folder / "README.md").write_text(text)
