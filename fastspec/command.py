"""What ``fastspec generate`` does: load, ask, stream."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    TextStreamer,
)

from fastspec import generation
from fastspec.images import load_image
from fastspec.model.vision import MULTIMODAL_MODELS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Checkpoints(Protocol):
    """Which models to load, and how."""

    target: str
    draft: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Question:
    """Everything the command line asks for; names as in :func:`fastspec.generate`."""

    target: str
    draft: str
    prompt: str
    images: tuple[Path, ...]
    gamma: int
    rule: str | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    dtype: str
    device: str


class AnswerStreamer(TextStreamer):
    """Prints the answer as it comes, without the space that separates it from the prompt."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        super().on_finalized_text(text, stream_end)


def answer(question: Question, stream: bool) -> dict[str, Any]:
    """Generates and returns text and statistics, ready for JSON; with ``stream`` the text is printed as it comes.

    Raises:
        ValueError: for images that cannot be read or checkpoints that cannot be loaded.
    """
    check_dtype(question.dtype)
    images = [load_image(path) for path in question.images]
    processor, target = load_target(question)
    draft, draft_tokenizer = load_draft(question)
    inputs = processor(
        images=images or None, text=chat_text(processor, question.prompt, len(images)), return_tensors="pt"
    ).to(question.device)

    sampling = {"do_sample": False}
    if question.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": question.temperature,
            "top_k": question.top_k,
            "top_p": question.top_p,
            "min_p": question.min_p or None,
        }
    start = time.perf_counter()
    output = generation.generate(
        target,
        draft=draft,
        gamma=question.gamma,
        rule=question.rule,
        seed=question.seed,
        tokenizer=processor.tokenizer,
        draft_tokenizer=draft_tokenizer,
        streamer=AnswerStreamer(processor.tokenizer) if stream else None,
        **inputs,
        **sampling,
        repetition_penalty=question.repetition_penalty,
        max_new_tokens=question.max_new_tokens,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    record = output.speculation
    return {
        "text": processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
        "tokens": tokens,
        "finish_reason": record.finish_reasons[0].name.lower(),
        "seconds": round(seconds, 4),
        "speculation": {
            "gamma": question.gamma,
            "target_passes": record.target_passes,
            "block_efficiency": _finite(record.block_efficiency),
            "acceptance_by_position": record.acceptance_by_position,
            "mbsu": _finite(record.mbsu),
        },
    }


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a name that is no element type."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")


def load_target(question: Checkpoints):
    """The processor and the target model."""
    if question.target == "miniature":
        from fastspec import miniature

        model = miniature.load_target(miniature_dtype(question), question.device)
        return miniature.load_processor(), model
    processor = _load(AutoProcessor, "target", question.target)
    model = _load(AutoModelForImageTextToText, "target", question.target, dtype=checkpoint_dtype(question))
    return processor, model.to(question.device).eval()


def load_draft(question: Checkpoints):
    """The draft model (or its keyword) and its tokenizer, if it has one."""
    if question.draft == "ngram":
        return "ngram", None
    built_in, _, name = question.draft.partition(":")
    if built_in == "miniature":
        from fastspec import miniature

        named = {"name": name} if name else {}
        return miniature.load_draft(**named, dtype=miniature_dtype(question), device=question.device), None
    config = _load(AutoConfig, "draft", question.draft)
    multimodal = config.model_type in MULTIMODAL_MODELS
    loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model = _load(loader, "draft", question.draft, dtype=checkpoint_dtype(question))
    try:
        tokenizer = _load(AutoTokenizer, "draft", question.draft)
    except ValueError:
        tokenizer = None  # a draft may come without one: then the sizes of the vocabularies are compared
    return model.to(question.device).eval(), tokenizer


def checkpoint_dtype(question: Checkpoints) -> torch.dtype | str:
    """As transformers takes it; ``auto`` is what the checkpoint is stored in."""
    return DTYPES.get(question.dtype, question.dtype)


def miniature_dtype(question: Checkpoints) -> torch.dtype:
    """The miniature is stored in half precision for its size alone, and runs in single unless told otherwise."""
    return DTYPES.get(question.dtype, torch.float32)


def _load(loader: Any, role: str, name: str, **arguments: Any) -> Any:
    """``from_pretrained``, without ever asking the network: a typing error must not start a download of gigabytes."""
    try:
        return loader.from_pretrained(name, local_files_only=True, **arguments)
    except (OSError, ValueError) as error:
        if Path(name).is_dir() or isinstance(error, ValueError):
            raise ValueError(f"cannot load the {role} from {name}: {error}") from None
        raise ValueError(
            f"cannot load the {role} {name!r}: no such directory, and not complete in the local hub cache "
            f"(to fetch it: hf download {name})"
        ) from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def chat_text(processor: Any, prompt: str, num_images: int, history: Sequence[tuple[str, str]] = ()) -> str:
    """The prompt in the model's chat format, images first; as it stands where there is no chat template.

    Raises:
        ValueError: for earlier turns where there is no chat template.
    """
    if getattr(processor, "chat_template", None):
        said = [*(words for turn in history for words in turn), prompt]
        messages = [
            {"role": "assistant" if place % 2 else "user", "content": [{"type": "text", "text": words}]}
            for place, words in enumerate(said)
        ]
        messages[0]["content"] = [{"type": "image"}] * num_images + messages[0]["content"]
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    if history:
        raise ValueError("earlier turns need a chat template, and the target's processor has none")
    placeholder = getattr(processor, "image_token", "<image>")
    return f"{placeholder}\n" * num_images + prompt
