"""What a draft learns from: blocks of plain text, or chats with their images."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from fastspec.images import load_image
from fastspec.lines import BadLines, DataError, Line, decode_line, read_lines
from fastspec.training.chats import missing_image, parse_chat
from fastspec.training.template import Example, encode_chat

#: An example with its pictures, where they are needed.
Item = tuple[Example, list[Any]]


class TextBlocks(Dataset):
    """Text files as blocks of equal length. Documents are separated by blank lines; each gets its begin and end token.

    Args:
        paths: the files.
        tokenizer: the target's.
        length: tokens of a block.
        bad: what happens to lines that are not UTF-8.
        placeholder: the image token, which stands for no picture in a text and is left out.

    Raises:
        ValueError: for a file that is missing, empty or without text.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Any,
        length: int,
        bad: BadLines,
        placeholder: int | None = None,
    ):
        self._length = length
        self._tokens = array("i")
        begin, end = (
            [] if token is None else [token] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        )
        for path in paths:
            before = len(self._tokens)
            documents = tqdm(
                _documents(read_lines(path, bad)), desc=f"reading {path.name}", unit=" documents"
            )
            for some in _groups(documents, 256):
                for ids in tokenizer(some, add_special_tokens=False)["input_ids"]:
                    self._tokens.extend(begin + [token for token in ids if token != placeholder] + end)
            if len(self._tokens) == before:
                raise ValueError(f"{path} has no text")

    def __len__(self) -> int:
        return -(-len(self._tokens) // self._length)

    def __getitem__(self, index: int) -> Item:
        ids = tuple(self._tokens[index * self._length : (index + 1) * self._length])
        return Example(ids, (False,) + (True,) * (len(ids) - 1), "", 0), []


class ChatRows(Dataset):
    """JSONL chats, checked when opened and encoded when asked for.

    Args:
        paths: the files.
        processor: the target's.
        images: the folder that image paths are relative to; each file's own folder if None.
        distilled: whether the answers come from ``fastspec distill-data``.
        with_images: whether pictures are read.
        length: most tokens of a chat without its image tokens; what is longer is cut.
        bad: what happens to bad lines. One that only shows when it is encoded gives an example with its ``fault``.

    Raises:
        ValueError: for a file that is missing, empty or without a usable line.
        DataError: for a bad line.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        processor: Any,
        images: Path | None,
        distilled: bool,
        with_images: bool,
        length: int,
        bad: BadLines,
    ):
        self._processor, self._images = processor, images
        self._distilled, self._with_images, self._length = distilled, with_images, length
        self._places: list[tuple[Path, int, int]] = []
        for path in paths:
            before = len(self._places)
            for line in tqdm(read_lines(path, bad), desc=f"checking {path.name}", unit=" lines"):
                try:
                    self._parse(line)
                except DataError as error:
                    bad.report(error)
                    continue
                self._places.append((path, line.number, line.offset))
            if len(self._places) == before:
                raise ValueError(f"{path} has no usable line" + (f"; {bad.summary()}" if bad else ""))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Item:
        path, number, offset = self._places[index]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                line = Line(path, number, offset, decode_line(path, number, file.readline()))
            return self._encode(line)
        except DataError as error:
            # Perhaps in a worker process: whoever counts bad lines is told by the batch.
            return Example((0,), (False,), "", 0, fault=error), []

    def _folder(self, line: Line) -> Path:
        return self._images or line.path.parent

    def _parse(self, line: Line):
        chat = parse_chat(line)
        if self._distilled and chat.turns[-1].token_ids is None:
            raise line.error("the answer has no 'token_ids'; fastspec distill-data writes them")
        if self._with_images and (missing := missing_image(self._folder(line), chat)):
            raise line.error(f"no image {missing!r} in {self._folder(line)}")
        return chat

    def _encode(self, line: Line) -> Item:
        chat = self._parse(line)
        try:
            example = encode_chat(self._processor, chat, self._distilled)
            placeholder = self._processor.tokenizer.convert_tokens_to_ids(self._processor.image_token)
            example = shorten(example, placeholder, self._length)
            names = example.images if self._with_images else ()
            return example, [load_image(self._folder(line) / name) for name in names]
        except DataError:
            raise
        except ValueError as error:
            raise line.error(str(error)) from None


def shorten(example: Example, placeholder: int, length: int) -> Example:
    """The example with at most ``length`` tokens besides its image placeholders.

    Raises:
        ValueError: if an image or every answer would be cut off.
    """
    count = length + example.ids.count(placeholder)
    if len(example.ids) <= count:
        return example
    if placeholder in example.ids[count:] or not any(example.spoken[:count]):
        raise ValueError(f"its first {length} tokens (--max-length) end before an answer or an image")
    return Example(
        example.ids[:count],
        example.spoken[:count],
        example.text,
        min(example.num_text, count),
        example.images,
    )


def _documents(lines: Iterable[Line]) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.text.strip():
            document.append(line.text)
        elif document:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def _groups(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for document in documents:
        group.append(document)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
