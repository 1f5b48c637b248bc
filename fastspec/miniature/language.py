"""Examples: a scene, a dialogue about it in one of the three tasks, and the facts its answers must state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from .captions import compose, request
from .conversations import converse
from .reading import Fact
from .scenes import Scene
from .science import pose

TASKS = ("caption", "conversation", "science")
SHORTEST, LONGEST = 20, 130  # words and marks over all answers of an example; at most 200 tokens

_MARKS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Example:
    """`turns` are (user, assistant) texts; `answer` holds one `Fact` per turn."""

    task: str
    scene: Scene
    turns: tuple[tuple[str, str], ...]
    answer: tuple[Fact, ...]

    @classmethod
    def random(cls, task: str, rng: Random, scene: Scene | None = None) -> Example:
        """An example of the task, about this scene or a random one; the same `rng` state gives the same text."""
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
        scene = scene or Scene.random(rng)
        tell = {"caption": _caption, "conversation": _conversation, "science": _science}[task]
        for _ in range(200):
            turns, answer = tell(rng, scene)
            length = sum(len(_MARKS.findall(text)) for _, text in turns)
            if SHORTEST <= length <= LONGEST:
                turns = tuple((_typed(rng, user), text) for user, text in turns)
                return cls(task, scene, turns, tuple(answer))
        raise RuntimeError(f"no {task} of {SHORTEST} to {LONGEST} words found for {scene}")


def _typed(rng: Random, user: str) -> str:
    """As people type: now and then without the capital or the mark at the end."""
    if rng.random() < 0.07:
        user = user[0].lower() + user[1:]
    if rng.random() < 0.07 and user[-1] in ".?":
        user = user[:-1]
    return user


def _caption(rng: Random, scene: Scene) -> tuple[list, list]:
    sentences = 1 + int(4 * rng.random())
    asked = sentences if rng.random() < 0.45 else None
    wordy = len(scene.things) == 1 or (len(scene.things) == 2 and rng.random() < 0.4)
    return [(request(rng, asked), compose(rng, scene, sentences, wordy))], [Fact("caption", None)]


def _conversation(rng: Random, scene: Scene) -> tuple[list, list]:
    turns = converse(rng, scene, 2 + int(3 * rng.random()))
    return [(user, text) for user, text, _ in turns], [fact for _, _, fact in turns]


def _science(rng: Random, scene: Scene) -> tuple[list, list]:
    user, text, letter = pose(rng, scene)
    return [(user, text)], [Fact("letter", letter)]
