"""Procedural scenes: a few flat objects on a three-by-three grid, and what is true about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from PIL import Image

SIDE = 96  # pixels of a picture
CELL = SIDE // 3
PATCH = 8

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "moon", "arrow")
COLOURS = {
    "red": (214, 38, 38),
    "orange": (246, 132, 24),
    "yellow": (250, 214, 36),
    "green": (36, 158, 68),
    "blue": (40, 92, 224),
    "purple": (132, 48, 172),
    "pink": (252, 134, 192),
    "brown": (126, 76, 36),
    "black": (24, 24, 28),
    "white": (252, 252, 252),
}
SIZES = {"small": 9.2, "large": 13.8}  # half the width in pixels
TEXTURES = ("solid", "striped", "dotted", "checked")
TONES = {
    "light grey": (205, 207, 211),
    "cream": (245, 234, 204),
    "light blue": (190, 220, 246),
    "light green": (200, 234, 200),
    "dark blue": (24, 34, 82),
    "dark grey": (72, 74, 80),
}
KINDS = ("plain", "shaded", "ruled")
RELATIONS = ("left", "right", "above", "below")
CELLS = tuple((row, column) for row in range(3) for column in range(3))

T = TypeVar("T")


def pick(rng: Random, options: Sequence[T]) -> T:
    """One of the options, evenly; cheaper than `Random.choice` and the same in every Python."""
    return options[int(rng.random() * len(options))]


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5


# A colour is used only on tones it stands out from, so that no object can hide.
VISIBLE = {
    tone: tuple(name for name, rgb in COLOURS.items() if _distance(rgb, back) >= 90)
    for tone, back in TONES.items()
}


@dataclass(frozen=True)
class Thing:
    """One object; `x`, `y` and `radius` are pixels, `angle` is degrees."""

    shape: str
    colour: str
    size: str
    texture: str
    cell: tuple[int, int]
    x: float
    y: float
    radius: float
    angle: float
    rgb: tuple[int, int, int]

    @classmethod
    def random(cls, rng: Random, shape: str, colour: str, cell: tuple[int, int]) -> Thing:
        """An object of this shape and colour in this cell, with everything else left to chance."""
        size = pick(rng, tuple(SIZES))
        texture = "solid" if rng.random() < 0.34 else pick(rng, TEXTURES[1:])
        radius = SIZES[size] * (0.94 + 0.12 * rng.random())
        play = min(CELL / 2 - radius, 5.0)
        return cls(
            shape=shape,
            colour=colour,
            size=size,
            texture=texture,
            cell=cell,
            x=(cell[1] + 0.5) * CELL + play * (2 * rng.random() - 1),
            y=(cell[0] + 0.5) * CELL + play * (2 * rng.random() - 1),
            radius=radius,
            angle=12 * (2 * rng.random() - 1),
            rgb=tuple(min(255, max(0, channel + int(21 * rng.random()) - 10)) for channel in COLOURS[colour]),
        )


@dataclass(frozen=True)
class Background:
    tone: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One to four things in different cells, no two alike in both shape and colour."""

    things: tuple[Thing, ...]
    background: Background

    @classmethod
    def random(cls, rng: Random) -> Scene:
        background = Background(pick(rng, tuple(TONES)), pick(rng, KINDS))
        colours = VISIBLE[background.tone]
        cells = list(CELLS)
        rng.shuffle(cells)
        things: list[Thing] = []
        for cell in cells[: 1 + int(4 * rng.random())]:
            while True:
                # Repeats are made likely: counts and comparisons need something to count.
                shape, colour = pick(rng, SHAPES), pick(rng, colours)
                if things and rng.random() < 0.3:
                    shape = pick(rng, things).shape
                elif things and rng.random() < 0.3:
                    colour = pick(rng, things).colour
                if all((shape, colour) != (other.shape, other.colour) for other in things):
                    break
            things.append(Thing.random(rng, shape, colour, cell))
        return cls(tuple(sorted(things, key=lambda thing: thing.cell)), background)

    def render(self) -> Image.Image:
        """The picture, 96 x 96 RGB."""
        from .drawing import draw

        return draw(self)

    def at(self, cell: tuple[int, int]) -> Thing | None:
        return next((thing for thing in self.things if thing.cell == cell), None)

    def where(self, **attributes: str) -> list[Thing]:
        """The things with these attributes, such as `where(shape="star", colour="red")`."""
        return [
            thing
            for thing in self.things
            if all(getattr(thing, name) == value for name, value in attributes.items())
        ]

    def related(self, relation: str, other: Thing) -> list[Thing]:
        return [thing for thing in self.things if thing is not other and holds(relation, thing, other)]


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether `a` is left of, right of, above or below `b`, by at least half a cell."""
    if relation == "left":
        return a.x < b.x - CELL / 2
    if relation == "right":
        return a.x > b.x + CELL / 2
    if relation == "above":
        return a.y < b.y - CELL / 2
    if relation == "below":
        return a.y > b.y + CELL / 2
    raise ValueError(f"unknown relation {relation!r}; expected one of {', '.join(RELATIONS)}")


def patch_owners(scene: Scene) -> list[int]:
    """For each of the 12 x 12 patches, row by row, the index of the thing that covers its centre, or -1."""
    side = SIDE // PATCH
    owners = [-1] * (side * side)
    for index, thing in enumerate(scene.things):
        reach = thing.radius
        for row in range(int((thing.y - reach) // PATCH), int((thing.y + reach) // PATCH) + 1):
            for column in range(int((thing.x - reach) // PATCH), int((thing.x + reach) // PATCH) + 1):
                dx, dy = (column + 0.5) * PATCH - thing.x, (row + 0.5) * PATCH - thing.y
                if max(abs(dx), abs(dy)) <= reach:
                    owners[row * side + column] = index
    return owners
