"""From chats to tokens through the target's chat template, and which of the tokens the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastspec.lines import DataError
from fastspec.training.chats import Chat

#: The stages of training, by what they read.
STAGES = ("pretrain", "instruct", "distill")


@dataclass(frozen=True)
class Example:
    """One row to learn from.

    Attributes:
        ids: tokens, with one placeholder per image.
        spoken: which of them are to be learned.
        text: what the processor is given to make the target's tokens.
        num_text: how many of the ids come from ``text``; those after it are appended as they are.
        images: paths of the images.
        fault: why its line gave nothing to learn.
    """

    ids: tuple[int, ...]
    spoken: tuple[bool, ...]
    text: str
    num_text: int
    images: tuple[str, ...] = ()
    fault: DataError | None = None


def prompt_text(processor: Any, messages: list[dict[str, Any]]) -> str:
    """The messages in the target's chat format, up to where the assistant begins.

    Raises:
        ValueError: if the target's processor has no chat template.
    """
    return _render(processor, messages, add_generation_prompt=True)


def encode_chat(processor: Any, chat: Chat, distilled: bool) -> Example:
    """The tokens of a chat.

    Args:
        processor: the target's.
        chat: the chat.
        distilled: whether to take the last answer's token ids as they are and learn nothing else.

    Raises:
        ValueError: for a distilled answer without token ids, or whose tokens do not spell its text.
    """
    tokenizer = processor.tokenizer
    if distilled:
        answer = chat.turns[-1]
        _check_distilled(tokenizer, answer.token_ids, answer.text)
        text = prompt_text(processor, chat.messages[:-1])
        ids = tokenizer(text)["input_ids"]
        said = [False] * len(ids) + [True] * len(answer.token_ids)
        return Example((*ids, *answer.token_ids), tuple(said), text, len(ids), chat.images)

    text, spans = _answer_spans(processor, chat.messages)
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    said = [
        any(first < end and last > start for start, end in spans) for first, last in encoded["offset_mapping"]
    ]
    # What the template puts after the last answer, spaces mostly, no assistant says; the end token it does.
    count = 1 + max(index for index, one in enumerate(said) if one)
    ids, said = ids[:count], said[:count]
    if ids[-1] != tokenizer.eos_token_id:
        ids, said = [*ids, tokenizer.eos_token_id], [*said, True]
    return Example(tuple(ids), tuple(said), text, count, chat.images)


def check_template(processor: Any) -> None:
    """Raises ValueError for a processor that chats cannot be encoded with."""
    if not getattr(processor, "chat_template", None):
        raise ValueError("the target's processor has no chat template, which chats need")
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(f"the target's tokenizer must be a fast one, got {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the target's tokenizer has no end token")


def _answer_spans(processor: Any, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat as text, and from where to where the assistant speaks."""
    text = _render(processor, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_text(processor, messages[:index])
        through = _render(processor, messages[: index + 1])
        if not (text.startswith(before) and text.startswith(through) and len(before) < len(through)):
            raise ValueError("the chat template changes earlier turns when later ones come: not supported")
        spans.append((len(before), len(through.rstrip())))
    return text, spans


def _render(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    if not getattr(processor, "chat_template", None):
        raise ValueError("the target's processor has no chat template, which chats need")
    return processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)


def _check_distilled(tokenizer: Any, token_ids: tuple[int, ...] | None, text: str) -> None:
    if token_ids is None:
        raise ValueError("the answer has no 'token_ids'; fastspec distill-data writes them")
    size = len(tokenizer)
    if max(token_ids) >= size:
        raise ValueError(f"token id {max(token_ids)} is outside the target's vocabulary of {size}")
    spelled = tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()
    if spelled != text.strip():
        raise ValueError(
            f"the token ids spell {spelled[:40]!r} and not {text[:40]!r} with the target's tokenizer: "
            "another tokenizer's answers?"
        )
