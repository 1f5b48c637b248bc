"""Task files: the prompts that a target and its drafts are evaluated on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastspec.images import load_image
from fastspec.lines import BadLines, DataError, Line, parse_object, read_lines, shown

if TYPE_CHECKING:
    from PIL.Image import Image

#: Where an image belongs in a text, in the LLaVA format.
PLACEHOLDER = "<image>"
#: Who speaks in turn, in the LLaVA format.
SPEAKERS = ("human", "gpt")
MINIATURE = "miniature:"
#: Held-out prompts of a miniature task without a limit: there is no end to them.
MINIATURE_PROMPTS = 100
FOLLOW_UP, TWO_PICTURES = "follow-up", "two-pictures"
#: From whose number on the second pictures are drawn.
OTHER_PICTURE = 500_000


@dataclass(frozen=True)
class TaskPrompt:
    """One question of a task.

    Attributes:
        id: its name, unique within the task.
        text: the user's words, without chat format or image placeholders.
        images: paths, or pictures that were drawn for it; they come before the first words.
        where: file and line that it was read from.
        history: earlier questions with their answers.
    """

    id: str
    text: str
    images: tuple[Path | Image, ...]
    where: tuple[Path, int]
    history: tuple[tuple[str, str], ...] = ()

    def load_images(self) -> list[Image]:
        """The pictures, decoded.

        Raises:
            DataError: for a file that is no image.
        """
        try:
            return [load_image(image) if isinstance(image, Path) else image for image in self.images]
        except ValueError as error:
            raise self.error(str(error)) from None

    def error(self, reason: str) -> DataError:
        """Why it cannot be asked, with file and line number."""
        return DataError(*self.where, reason)


@dataclass(frozen=True)
class Task:
    """Prompts under a name.

    Attributes:
        name: as the user gave it.
        prompts: at least one.
    """

    name: str
    prompts: tuple[TaskPrompt, ...]

    @property
    def digest(self) -> str:
        """Changes with the prompts' names, texts and numbers of images."""
        content = [(one.id, one.text, len(one.images), *one.history) for one in self.prompts]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def read_task(
    name: str,
    limit: int | None = None,
    image_folder: Path | None = None,
    bad: BadLines | None = None,
) -> Task:
    """Reads a JSONL file of prompts, or takes held-out prompts of the miniature.

    A line is an object with ``id``, optionally ``images`` (paths; ``image`` for a single one), and either
    ``prompt``, the user's words, or ``conversations`` in the LLaVA format. One that ends with a human turn is asked
    that turn, after those before it; of any other the first human turn is asked.
    ``<image>`` placeholders may be left out; images come first in the prompt wherever they stood, as in LLaVA.

    Args:
        name: a file, or ``miniature:`` and ``caption``, ``conversation``, ``science``, ``two-pictures`` or
            ``follow-up``, the last question of a conversation.
        limit: only the first so many prompts; lines after them are not read.
        image_folder: what relative image paths start from; the task file's folder unless given.
        bad: what happens to malformed lines; the first ends the reading unless given.

    Raises:
        ValueError: for a missing or empty file, or one without a prompt.
        DataError: for a line that is malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if name.startswith(MINIATURE):
        return Task(name, tuple(_miniature_prompts(name, limit or MINIATURE_PROMPTS)))
    path, bad = Path(name), BadLines() if bad is None else bad
    prompts = tuple(islice(_read_prompts(path, image_folder or path.parent, bad), limit))
    if not prompts:
        raise ValueError(f"{name} holds no prompts" + (f"; {bad.summary()}" if bad else ""))
    return Task(name, prompts)


def _miniature_prompts(name: str, count: int) -> Iterator[TaskPrompt]:
    from fastspec import miniature
    from fastspec.miniature.language import TASKS

    task = name[len(MINIATURE) :]
    known = (*TASKS, FOLLOW_UP, TWO_PICTURES)
    if task not in known:
        names = ", ".join(MINIATURE + one for one in known)
        raise ValueError(f"unknown task {name!r}; expected one of {names}, or a file")
    source = {FOLLOW_UP: "conversation", TWO_PICTURES: "caption"}.get(task, task)
    for seed in range(count):
        example = miniature.sample_example(source, seed)
        *history, (text, _) = example.turns if task == FOLLOW_UP else example.turns[:1]
        images = [example.scene.render()]
        if task == TWO_PICTURES:
            images.append(miniature.sample_example(source, OTHER_PICTURE + seed).scene.render())
        yield TaskPrompt(str(seed), text, tuple(images), (Path(name), seed), tuple(history))


def _read_prompts(path: Path, folder: Path, bad: BadLines) -> Iterator[TaskPrompt]:
    seen: dict[str, int] = {}
    for line in read_lines(path, bad):
        if not line.text.strip():
            continue
        try:
            prompt = _parse(line, folder)
            if prompt.id in seen:
                raise line.error(f"id {prompt.id!r} was given to line {seen[prompt.id]} already")
        except DataError as error:
            bad.report(error)
            continue
        seen[prompt.id] = line.number
        yield prompt


def _parse(line: Line, folder: Path) -> TaskPrompt:
    entry = parse_object(line)
    try:
        return _prompt(entry, folder, (line.path, line.number))
    except ValueError as error:
        raise line.error(str(error)) from None


def _prompt(entry: dict[str, Any], folder: Path, where: tuple[Path, int]) -> TaskPrompt:
    name = entry.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"expected 'id' to be a text or a whole number, got {shown(name)}")
    if ("prompt" in entry) == ("conversations" in entry):
        given = "both" if "prompt" in entry else "neither"
        raise ValueError(f"expected either 'prompt' or 'conversations', got {given}")
    if "prompt" in entry:
        history, text = [], entry["prompt"]
    else:
        history, text = _question(entry["conversations"])
    if not isinstance(text, str):
        raise ValueError(f"expected 'prompt' to be a text, got {shown(text)}")
    images = _image_paths(entry, folder)
    said = [text, *(words for turn in history for words in turn)]
    placeholders = sum(words.count(PLACEHOLDER) for words in said)
    if placeholders and placeholders != len(images):
        raise ValueError(f"{placeholders} {PLACEHOLDER} placeholders, but {len(images)} images")
    said = [words.replace(PLACEHOLDER, "").strip() for words in said]
    if not all(said):
        raise ValueError("the prompt is empty" if not said[0] else "a turn of 'conversations' says nothing")
    "".join((str(name), *said)).encode()  # half of a surrogate pair would stop the tokenizer later
    text, *earlier = said
    return TaskPrompt(str(name), text, images, where, tuple(zip(earlier[::2], earlier[1::2], strict=True)))


def _question(turns: Any) -> tuple[list[tuple[str, str]], str]:
    """The turns before the question, in pairs, and the question."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"expected 'conversations' to be a list of turns, got {shown(turns)}")
    for turn in turns:
        if turn.get("from") in SPEAKERS and not isinstance(turn.get("value"), str):
            raise ValueError(f"expected a turn's 'value' to be a text, got {shown(turn.get('value'))}")
    spoken = [(turn["from"], turn["value"]) for turn in turns if turn.get("from") in SPEAKERS]
    first = next((place for place, (who, _) in enumerate(spoken) if who == SPEAKERS[0]), None)
    if first is None:
        raise ValueError("no turn of 'conversations' is from 'human'")
    if spoken[-1][0] != SPEAKERS[0]:
        return [], spoken[first][1]
    expected = [SPEAKERS[place % 2] for place in range(len(spoken))]
    if [who for who, _ in spoken] != expected:
        raise ValueError(
            "the turns of 'conversations' must be human, gpt, human, ... to be asked the last one"
        )
    words = [value for _, value in spoken]
    return list(zip(words[:-1:2], words[1::2], strict=True)), words[-1]


def _image_paths(entry: dict, folder: Path) -> tuple[Path, ...]:
    if "images" in entry and "image" in entry:
        raise ValueError("expected 'images' or 'image', got both")
    given = entry.get("images", entry.get("image"))
    names = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected 'images' to be a list of paths, got {given!r}")
    paths = tuple(folder / name for name in names)
    for path in paths:
        try:
            found = path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            found = False
        if not found:
            raise ValueError(f"image file not found: {str(path)!r}")
    return paths
