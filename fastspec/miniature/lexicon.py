"""The words for what a scene holds. Texts are written from these tables and read back with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from random import Random

from .scenes import CELLS, SHAPES, Scene, Thing, pick

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "moon": ("moon", "crescent"),
    "arrow": ("arrow",),
}
PLURALS = {"box": "boxes", "rhombus": "rhombuses", "cross": "crosses"}
COLOUR_WORDS = {"purple": ("purple", "violet")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
TEXTURE_WORDS = {
    "solid": ("solid", "unpatterned"),
    "striped": ("striped", "banded"),
    "dotted": ("dotted", "spotted"),
    "checked": ("checked", "chequered"),
}
TEXTURE_TAILS = {
    "striped": ("with stripes", "covered in stripes"),
    "dotted": ("with dots", "covered in dots"),
    "checked": ("with checks", "covered in checks"),
}
TONE_WORDS = {
    "light grey": ("light grey", "pale grey"),
    "cream": ("cream", "cream coloured"),
    "light blue": ("light blue", "pale blue"),
    "light green": ("light green", "pale green"),
    "dark blue": ("dark blue", "navy"),
    "dark grey": ("dark grey", "charcoal"),
}
KIND_TEXT = {
    "plain": "[a plain {tone} background|a {tone} background|a plain {tone} backdrop|{tone} ground]",
    "shaded": "[a shaded {tone} background|a {tone} background that darkens downwards|a {tone} gradient]",
    "ruled": "[a {tone} grid|{tone} squared paper|a ruled {tone} background|a {tone} background with grid lines]",
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATION_WORDS = {
    "left": ("to the left of", "left of", "further left than"),
    "right": ("to the right of", "right of", "further right than"),
    "above": ("above", "higher than", "higher up than"),
    "below": ("below", "beneath", "lower than", "underneath"),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")
ROW_WORDS = (
    ("the top row", "the upper row"),
    ("the middle row", "the central row"),
    ("the bottom row", "the lower row"),
)
COLUMN_WORDS = (
    ("the left column", "the left-hand column"),
    ("the middle column", "the central column"),
    ("the right column", "the right-hand column"),
)
IN_ROW = (
    ("on the left", "at the left end"),
    ("in the middle", "in the centre"),
    ("on the right", "at the right end"),
)
IN_COLUMN = (
    ("at the top", "at the upper end"),
    ("in the middle", "halfway down"),
    ("at the bottom", "at the lower end"),
)


def _spots(cell: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    """All (preposition, name) pairs of a cell, as in "in the" + "top left corner"."""
    vertical = (("top", "upper"), ("middle", "centre"), ("bottom", "lower"))[cell[0]]
    side = COLUMNS[cell[1]]
    if cell == (1, 1):
        return tuple(
            ("in the", name) for name in ("centre", "middle", "very centre", "very middle", "exact centre")
        )
    if cell[1] == 1:
        plain, other = vertical
        return (
            ("at the", plain),
            ("in the", f"{plain} centre"),
            ("in the", f"{plain} middle"),
            ("in the", f"{other} middle"),
            ("near the", f"{plain} edge"),
        )
    if cell[0] == 1:
        return (
            ("on the", side),
            ("on the", f"{side} side"),
            ("in the", f"middle {side}"),
            ("in the", f"centre {side}"),
            ("near the", f"{side} edge"),
        )
    return tuple(
        ("in the", name)
        for word in vertical
        for name in (f"{word} {side}", f"{word} {side} corner", f"{word} {side} part")
    )


SPOTS = {cell: _spots(cell) for cell in CELLS}
SPOT_CELLS = {name: cell for cell in CELLS for _, name in SPOTS[cell]}


@cache
def _compile(template: str) -> tuple:
    """Text and bracketed choices, nested: "a [b|c [d|e]]" becomes parts to join."""
    position = 0

    def sequence(closing: bool) -> tuple:
        nonlocal position
        alternatives, parts, text = [], [], ""
        while position < len(template):
            character = template[position]
            position += 1
            if character == "[":
                parts.append(text)
                text = ""
                parts.append(sequence(True))
            elif character == "|" and closing:
                alternatives.append((*parts, text))
                parts, text = [], ""
            elif character == "]" and closing:
                alternatives.append((*parts, text))
                return tuple(alternatives)
            else:
                text += character
        if closing:
            raise ValueError(f"unclosed bracket in {template!r}")
        return (*parts, text)

    return sequence(False)


def _choose(rng: Random, parts: tuple) -> str:
    return "".join(part if isinstance(part, str) else _choose(rng, pick(rng, part)) for part in parts)


_SPACES = re.compile(r" {2,}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def tidy(text: str) -> str:
    """Single spaces, none before marks, and "an" where it belongs."""
    text = _SPACES.sub(" ", text).replace(" ,", ",").replace(" .", ".").strip(" ")
    return _ARTICLE.sub(r"\1n ", text)


def say(rng: Random, template: str, **slots: object) -> str:
    """Choose among the template's bracketed wordings, fill in the slots, tidy up. Templates are cached: pass
    constants, and put what varies into slots."""
    text = _choose(rng, _compile(template))
    return tidy(text.format(**slots) if slots else text)


def sentence(rng: Random, template: str, **slots: object) -> str:
    text = say(rng, template, **slots)
    return text[0].upper() + text[1:]


def listed(rng: Random, phrases: Sequence[str], last: str = "and") -> str:
    """ "a, b and c", with or without the comma before the last."""
    if len(phrases) < 2:
        return "".join(phrases)
    comma = "," if len(phrases) > 2 and rng.random() < 0.4 else ""
    return f"{', '.join(phrases[:-1])}{comma} {last} {phrases[-1]}"


def shape_noun(rng: Random, shape: str, count: int = 1) -> str:
    word = pick(rng, SHAPE_WORDS[shape])
    return word if count == 1 else PLURALS.get(word, word + "s")


def colour_word(rng: Random, colour: str) -> str:
    return pick(rng, COLOUR_WORDS.get(colour, (colour,)))


def described(rng: Random, thing: Thing, size: bool, texture: str) -> str:
    """ "large red star with stripes"; `texture` is "always", "patterned" (solid goes unsaid) or "never"."""
    words = [pick(rng, SIZE_WORDS[thing.size])] if size else []
    tail = ""
    if texture == "always" or (texture == "patterned" and thing.texture != "solid"):
        if thing.texture != "solid" and rng.random() < 0.3:
            tail = " " + pick(rng, TEXTURE_TAILS[thing.texture])
        else:
            words.append(pick(rng, TEXTURE_WORDS[thing.texture]))
    words.append(colour_word(rng, thing.colour))
    if len(words) == 3 and rng.random() < 0.25:
        words[0], words[1] = words[1], words[0]
    return " ".join([*words, shape_noun(rng, thing.shape)]) + tail


def named(rng: Random, thing: Thing, scene: Scene, full: float = 0.5) -> str:
    """ "red star", or just "star" (or "striped one's" kin) where that is enough to tell which."""
    if len(scene.where(shape=thing.shape)) == 1 and rng.random() >= full:
        return shape_noun(rng, thing.shape)
    return f"{colour_word(rng, thing.colour)} {shape_noun(rng, thing.shape)}"


def spot(rng: Random, cell: tuple[int, int]) -> str:
    """ "in the top left corner"."""
    return " ".join(pick(rng, SPOTS[cell]))


def spot_name(rng: Random, cell: tuple[int, int]) -> str:
    """ "top left corner", to be used after "the"."""
    return pick(rng, SPOTS[cell])[1]


def backdrop(rng: Random, scene: Scene) -> str:
    """ "a plain cream background"."""
    tone = pick(rng, TONE_WORDS[scene.background.tone])
    return say(rng, KIND_TEXT[scene.background.kind], tone=tone)


def relation(rng: Random, name: str) -> str:
    return pick(rng, RELATION_WORDS[name])


NOUNS = {word: shape for shape in SHAPES for word in SHAPE_WORDS[shape]}
