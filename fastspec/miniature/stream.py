"""Training examples without end, made by worker processes or in the process itself. Needs no torch."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

import numpy as np

from .language import TASKS, Example
from .scenes import CELLS, COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene, patch_owners
from .tokens import BOS, EOS, IMAGE, IMAGE_TOKENS, PAD, encode, load_tokenizer

TEXT_LENGTH = 256  # tokens of a row besides those of the image
# What a patch's label tells of the thing that covers it.
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
    "cell": CELLS,
}
KINDS = ("picture", "chat", "plain")


@dataclass(frozen=True)
class Chunk:
    """Rows of training data.

    ids    : int16 [n, length], padded with `PAD`; `picture` rows hold the expanded image tokens
    spoken : bool  [n, length], the tokens to learn
    images : uint8 [n, 96, 96, 3], and
    labels : int8  [n, 144, 5], what covers each patch, by `ATTRIBUTES`, -1 for nothing; `picture` rows only
    """

    ids: np.ndarray
    spoken: np.ndarray
    images: np.ndarray | None = None
    labels: np.ndarray | None = None


def row_length(kind: str) -> int:
    return TEXT_LENGTH + (IMAGE_TOKENS if kind == "picture" else 0)


def _patch_labels(scene: Scene) -> np.ndarray:
    table = np.full((len(scene.things) + 1, len(ATTRIBUTES)), -1, np.int8)
    for index, thing in enumerate(scene.things):
        table[index] = [values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()]
    return table[patch_owners(scene)]


def expand_image(ids: list[int], spoken: list[bool]) -> tuple[list[int], list[bool]]:
    """One `<image>` becomes as many as the picture has patches."""
    at = ids.index(IMAGE)
    return (
        ids[:at] + [IMAGE] * IMAGE_TOKENS + ids[at + 1 :],
        spoken[:at] + [False] * IMAGE_TOKENS + spoken[at + 1 :],
    )


def drop_image(ids: list[int]) -> list[int]:
    """What a text-only draft sees of a prompt: everything but the image tokens."""
    return [token for token in ids if token != IMAGE]


def _dialogue(tokenizer, rng: Random, scene: Scene, kind: str) -> tuple[list[int], list[bool]]:
    """One example of each task about the scene, in random order, in one dialogue as long as fits."""
    ids, spoken = [], []
    for task in rng.sample(TASKS, len(TASKS)):
        example = Example.random(task, rng, scene)
        more, said = encode(tokenizer, example.turns, image=not ids)
        if len(ids) + len(more) > TEXT_LENGTH - 1:
            break
        ids, spoken = ids + more, spoken + said
    if kind == "picture":
        return expand_image(ids, spoken)
    kept = [index for index, token in enumerate(ids) if token != IMAGE]
    return [ids[index] for index in kept], [spoken[index] for index in kept]


def _plain(tokenizer, rng: Random) -> tuple[list[int], list[bool]]:
    """Texts about several scenes, without any chat format, each closed by `</s>`."""
    ids: list[int] = []
    while True:
        example = Example.random(rng.choice(TASKS), rng)
        text = " ".join(assistant for _, assistant in example.turns)
        more = [*tokenizer.encode(text, add_special_tokens=False).ids, EOS, BOS]
        if len(ids) + len(more) > TEXT_LENGTH:
            return ids[:-1], [True] * (len(ids) - 1)
        ids += more


def make_chunk(tokenizer, kind: str, seed: int, number: int, rows: int) -> Chunk:
    """Chunk `number` of a run: always the same for the same arguments, and apart from held-out scenes."""
    rng = Random(f"training {seed} {kind} {number}")
    ids = np.full((rows, row_length(kind)), PAD, np.int16)
    spoken = np.zeros(ids.shape, bool)
    images = np.empty((rows, SIDE, SIDE, 3), np.uint8) if kind == "picture" else None
    labels = np.empty((rows, IMAGE_TOKENS, len(ATTRIBUTES)), np.int8) if kind == "picture" else None
    for row in range(rows):
        if kind == "plain":
            tokens, said = _plain(tokenizer, rng)
        else:
            scene = Scene.random(rng)
            tokens, said = _dialogue(tokenizer, rng, scene, kind)
            if kind == "picture":
                images[row] = np.asarray(scene.render())
                labels[row] = _patch_labels(scene)
        ids[row, 0] = BOS
        ids[row, 1 : len(tokens) + 1] = tokens[: ids.shape[1] - 1]
        spoken[row, 1 : len(tokens) + 1] = said[: ids.shape[1] - 1]
    return Chunk(ids, spoken, images, labels)


def _work(folder: str, kind: str, seed: int, numbers: Iterator[int], rows: int, outbox) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(folder)
    for number in numbers:
        outbox.put(make_chunk(tokenizer, kind, seed, number, rows))


class Source:
    """Chunks of one kind. With workers they are made ahead in other processes, else when asked for."""

    def __init__(self, folder: str | Path, kind: str, seed: int, rows: int, workers: int):
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind, self._seed, self._rows = kind, seed, rows
        self._numbers = count()
        self._tokenizer = load_tokenizer(folder)
        self._workers: list[multiprocessing.process.BaseProcess] = []
        if workers:
            context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            self._outbox = context.Queue(maxsize=2 * workers)
            self._workers = [
                context.Process(
                    target=_work,
                    args=(str(folder), kind, seed, count(worker, workers), rows, self._outbox),
                    daemon=True,
                )
                for worker in range(workers)
            ]
            for process in self._workers:
                process.start()

    @property
    def parallel(self) -> bool:
        return bool(self._workers)

    def take(self, wait: bool) -> Chunk | None:
        """The next chunk; without `wait`, None where no worker has one ready."""
        if not self._workers:
            return (
                make_chunk(self._tokenizer, self.kind, self._seed, next(self._numbers), self._rows)
                if wait
                else None
            )
        while (chunk := self._poll(5.0 if wait else 0.0)) is None and wait:
            if not all(process.is_alive() for process in self._workers):
                raise RuntimeError("a worker that makes training data has died; its traceback is above")
        return chunk

    def _poll(self, seconds: float) -> Chunk | None:
        try:
            return self._outbox.get(block=seconds > 0, timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.join()
        self._workers = []
