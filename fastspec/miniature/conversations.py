"""Conversations about a scene, two to four turns, later ones leaning on earlier ones."""

from __future__ import annotations

from random import Random

from . import comparisons, questions
from .questions import Talk, Turn
from .scenes import Scene, pick

# What may be asked; the more often it stands here, the more often it is.
QUESTIONS = (
    *(comparisons.total, comparisons.count, comparisons.count, questions.colour, questions.colour),
    *(questions.content, questions.content, questions.place, questions.place),
    *(questions.exists, questions.exists, comparisons.position, comparisons.position),
    *(comparisons.neighbour, comparisons.neighbour, comparisons.bigger, comparisons.same),
    *(questions.size, questions.texture, questions.texture, questions.ground),
    *(comparisons.others, comparisons.others, comparisons.others),
)
OPENINGS = ("", "", "", "", "And ", "Then ", "OK, ", "Thanks. ")  # of a follow-up


def converse(rng: Random, scene: Scene, turns: int) -> list[Turn]:
    talk, said = Talk(), []
    while len(said) < turns:
        attempt = Talk(talk.focus, set(talk.asked))
        turn = pick(rng, QUESTIONS)(rng, scene, attempt)
        if turn is None:
            continue
        talk, (user, answer, fact) = attempt, turn
        opening = pick(rng, OPENINGS) if said else ""
        user = opening + (user if opening in ("And ", "Then ", "OK, ") else user[0].upper() + user[1:])
        said.append((user[0].upper() + user[1:], answer, fact))
    return said
