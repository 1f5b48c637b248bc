"""A small real LLaVA with three text-only drafts and one with an image adapter, and endless pictures to ask it about.

from fastspec import miniature

target, draft, processor = miniature.load_target(), miniature.load_draft(), miniature.load_processor()
image, prompt = miniature.prompts(1)[0]
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from .language import TASKS, Example

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = Path(__file__).parent / "weights"
DRAFTS = ("base", "chat", "ft")
#: Made by a stage of its own: `python -m fastspec.miniature.train --stage image`.
IMAGE_DRAFT = "image"

__all__ = [
    "DRAFTS",
    "IMAGE_DRAFT",
    "WEIGHTS",
    "load_draft",
    "load_processor",
    "load_target",
    "prepare",
    "prompts",
    "sample_example",
]


def _folder(name: str) -> Path:
    folder = WEIGHTS / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the miniature's weights are missing: no {folder}; `python -m fastspec.miniature.train` makes them"
            + (" with `--stage image`" if name == f"draft-{IMAGE_DRAFT}" else "")
        )
    return folder


def load_target(dtype: torch.dtype | str = "float32", device: str = "cpu") -> LlavaForConditionalGeneration:
    """The target, 7.9 M parameters, in eval mode."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(_folder("target"), dtype=dtype).to(device).eval()


def load_draft(
    name: str = "ft", dtype: torch.dtype | str = "float32", device: str = "cpu"
) -> LlamaForCausalLM | LlavaForConditionalGeneration:
    """A draft of 0.17 M parameters: `base` (plain text), `chat` (dialogues), `ft` (the target's answers), all three
    text-only, or `image` (the target's answers, with an adapter to the target's vision features)."""
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    if name not in (*DRAFTS, IMAGE_DRAFT):
        raise ValueError(f"unknown draft {name!r}; expected one of {', '.join((*DRAFTS, IMAGE_DRAFT))}")
    loader = LlavaForConditionalGeneration if name == IMAGE_DRAFT else LlamaForCausalLM
    return loader.from_pretrained(_folder(f"draft-{name}"), dtype=dtype).to(device).eval()


def load_processor() -> LlavaProcessor:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(_folder("target"))


def prepare(processor: LlavaProcessor, image: Image.Image, question: str) -> BatchFeature:
    """The target's inputs for a question about a picture: input_ids [1, T], attention_mask, pixel_values."""
    from .tokens import question_text

    return processor(images=image, text=question_text(question, image=True), return_tensors="pt")


def sample_example(task: str = "caption", seed: int = 0) -> Example:
    """A held-out example: the same for the same arguments, and never one that was trained on."""
    return Example.random(task, Random(f"held-out {task} {seed}"))


def prompts(count: int, task: str | None = None, start: int = 0) -> list[tuple[Image.Image, str]]:
    """(picture, prompt) pairs of held-out scenes, the prompt ready for the processor; tasks in turn, or just one.

    For conversations it is the first question.
    """
    from .tokens import prompt_text

    pairs = []
    for seed in range(start, start + count):
        example = sample_example(task or TASKS[seed % len(TASKS)], seed)
        pairs.append((example.scene.render(), prompt_text(example.turns)))
    return pairs
