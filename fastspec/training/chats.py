"""Chats in the LLaVA conversation format, one JSON object per line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastspec.lines import Line, parse_object

IMAGE_TAG = "<image>"
#: Who speaks, by the format's names and by those of chat templates.
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says; ``<image>`` tags are taken out of the text and counted.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: what is said.
        num_images: pictures shown with it.
        token_ids: the answer as the target wrote it, end token included; only distilled answers have them.
    """

    role: str
    text: str
    num_images: int = 0
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Chat:
    """One conversation and its images, as paths relative to the folder of images."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As chat templates take it, images before the text."""
        return [
            {
                "role": turn.role,
                "content": [{"type": "image"}] * turn.num_images + [{"type": "text", "text": turn.text}],
            }
            for turn in self.turns
        ]


def parse_chat(line: Line) -> Chat:
    """A chat from its line.

    Raises:
        DataError: with file, line number and reason.
    """

    def check(good: bool, reason: str) -> None:
        if not good:
            raise line.error(reason)

    record = parse_object(line)
    conversations = record.get("conversations")
    check(isinstance(conversations, list) and bool(conversations), "no 'conversations', or an empty list")
    turns = tuple(_parse_turn(index, turn, check) for index, turn in enumerate(conversations))

    spoken = [turn.role for turn in turns]
    if spoken[0] == "system":
        spoken = spoken[1:]
    expected = ["user", "assistant"] * (len(spoken) // 2)
    check(
        bool(spoken) and spoken == expected, "the turns must be human, gpt, human, gpt, ... and end with gpt"
    )

    images = record.get("image") or []
    images = [images] if isinstance(images, str) else images
    check(
        isinstance(images, list) and all(isinstance(image, str) for image in images),
        "'image' must be a path or a list of paths",
    )
    tags = sum(turn.num_images for turn in turns)
    check(tags == len(images), f"{tags} {IMAGE_TAG} tags for {len(images)} images")
    return Chat(turns, tuple(images))


def _parse_turn(index: int, turn: Any, check: Any) -> Turn:
    check(isinstance(turn, dict), f"conversations[{index}] is not an object")
    speaker, text = turn.get("from"), turn.get("value")
    check(
        isinstance(speaker, str) and speaker in SPEAKERS,
        f"conversations[{index}]['from'] must be one of {', '.join(SPEAKERS)}, got {speaker!r}",
    )
    check(isinstance(text, str), f"conversations[{index}]['value'] must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # it would stop the tokenizer later
        check(False, f"conversations[{index}]['value'] holds half of a surrogate pair")
    tags = text.count(IMAGE_TAG)
    check(not tags or speaker == "human", f"conversations[{index}]: {IMAGE_TAG} in a turn of {speaker}")
    if tags:
        text = text.replace(IMAGE_TAG, "").strip()
    token_ids = turn.get("token_ids")
    # A distilled answer may be the end token alone.
    check(bool(text.strip()) or tags > 0 or bool(token_ids), f"conversations[{index}] says nothing")
    if token_ids is not None:
        good = isinstance(token_ids, list) and all(type(token) is int and token >= 0 for token in token_ids)
        check(good and bool(token_ids), f"conversations[{index}]['token_ids'] must be a list of token ids")
        token_ids = tuple(token_ids)
    return Turn(SPEAKERS[speaker], text, tags, token_ids)


def missing_image(folder: Path, chat: Chat) -> str | None:
    """The first image of the chat that is not in the folder."""

    def there(image: str) -> bool:
        try:
            return (folder / image).is_file()
        except (OSError, ValueError):  # a name that no file can have
            return False

    return next((image for image in chat.images if not there(image)), None)
