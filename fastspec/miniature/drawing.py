"""Draws a scene with Pillow, three times as large as needed, and reduces it."""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, radians, sin

from PIL import Image, ImageDraw

from .scenes import SIDE, TONES, Background, Scene, Thing

SCALE = 3  # supersampling


def _ring(count: int, radius: float, start: float) -> list[tuple[float, float]]:
    return [
        (radius * cos(start + 2 * pi * step / count), radius * sin(start + 2 * pi * step / count))
        for step in range(count)
    ]


def _star() -> list[tuple[float, float]]:
    outer, inner = _ring(5, 1.08, -pi / 2), _ring(5, 0.46, -pi / 2 + pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * pi * step / 40 for step in range(40)]
    return [
        (
            sin(a) ** 3,
            0.08 - (13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16.0,
        )
        for a in angles
    ]


# Corners in units of the radius, y downwards.
OUTLINES = {
    "square": [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)],
    "triangle": [(0, -1.0), (1.0, 0.82), (-1.0, 0.82)],
    "diamond": [(0, -1.1), (0.78, 0), (0, 1.1), (-0.78, 0)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        *((-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36)),
        *((0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)),
    ],
    "arrow": [
        (0, -1.08),
        (0.95, -0.02),
        (0.36, -0.02),
        (0.36, 1),
        (-0.36, 1),
        (-0.36, -0.02),
        (-0.95, -0.02),
    ],
}


def _second_tone(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """The other colour of a pattern: light on dark colours, dark on light ones."""
    red, green, blue = rgb
    bright = 0.3 * red + 0.6 * green + 0.1 * blue > 140
    goal, share = (0, 0.62) if bright else (255, 0.66)
    return tuple(int(channel + (goal - channel) * share) for channel in rgb)


@lru_cache(maxsize=64)
def _pattern(texture: str, side: int, step: int) -> Image.Image:
    """A mask, white where the second tone goes."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    if texture == "striped":
        for top in range(step // 2, side, 2 * step):
            pen.rectangle((0, top, side, top + step - 1), fill=255)
    elif texture == "dotted":
        reach = side // (2 * step) + 1
        for row in range(-reach, reach + 1):
            for column in range(-reach + row % 2, reach + 1, 2):
                x, y = side / 2 + column * 1.25 * step, side / 2 + row * 1.25 * step
                pen.ellipse((x - 0.6 * step, y - 0.6 * step, x + 0.6 * step, y + 0.6 * step), fill=255)
    elif texture == "checked":
        for row in range(side // step + 1):
            for column in range(row % 2, side // step + 1, 2):
                x, y = column * step, row * step
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    return mask


def _outline(thing: Thing, side: int) -> Image.Image:
    """A mask of the shape in a square tile whose middle is the thing's."""
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    middle, radius = side / 2, thing.radius * SCALE
    c, s = cos(radians(thing.angle)), sin(radians(thing.angle))

    def place(x: float, y: float) -> tuple[float, float]:
        return middle + radius * (c * x - s * y), middle + radius * (s * x + c * y)

    def disc(x: float, y: float, size: float, fill: int) -> None:
        x, y = place(x, y)
        pen.ellipse((x - size * radius, y - size * radius, x + size * radius, y + size * radius), fill=fill)

    if thing.shape in OUTLINES:
        pen.polygon([place(x, y) for x, y in OUTLINES[thing.shape]], fill=255)
    else:
        disc(0, 0, 0.98, 255)
        if thing.shape == "ring":
            disc(0, 0, 0.5, 0)
        elif thing.shape == "moon":
            disc(0.55, -0.1, 0.7, 0)
    return mask


def _shift(rgb: tuple[int, int, int], amount: int) -> tuple[int, int, int]:
    return tuple(min(255, max(0, channel + amount)) for channel in rgb)


@lru_cache(maxsize=32)
def _backdrop(background: Background) -> Image.Image:
    side, rgb = SIDE * SCALE, TONES[background.tone]
    canvas = Image.new("RGB", (side, side), rgb)
    pen = ImageDraw.Draw(canvas)
    if background.kind == "shaded":
        for y in range(side):
            pen.line((0, y, side, y), fill=_shift(rgb, round(22 - 44 * y / side)))
    elif background.kind == "ruled":
        for offset in range(6 * SCALE, side, 12 * SCALE):
            for line in ((offset, 0, offset, side), (0, offset, side, offset)):
                pen.line(line, fill=_shift(rgb, 30 if sum(rgb) < 380 else -30), width=SCALE)
    return canvas


def draw(scene: Scene) -> Image.Image:
    """The scene as a 96 x 96 RGB picture; the same scene gives the same bytes."""
    canvas = _backdrop(scene.background).copy()
    for thing in scene.things:
        side = 2 * int(1.2 * thing.radius * SCALE)
        tile = Image.new("RGB", (side, side), thing.rgb)
        if thing.texture != "solid":
            step = (3 if thing.size == "small" else 4) * SCALE
            tile.paste(_second_tone(thing.rgb), mask=_pattern(thing.texture, side, step))
        corner = (round(thing.x * SCALE) - side // 2, round(thing.y * SCALE) - side // 2)
        canvas.paste(tile, corner, _outline(thing, side))
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=1.5)
