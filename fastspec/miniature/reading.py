"""Reads text about a scene back into facts, and judges them against the scene."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .lexicon import (
    COLOUR_WORDS,
    COLUMN_WORDS,
    IN_COLUMN,
    IN_ROW,
    NOUNS,
    NUMBERS,
    PLURALS,
    RELATION_WORDS,
    ROW_WORDS,
    SIZE_WORDS,
    SPOT_CELLS,
    TEXTURE_TAILS,
    TEXTURE_WORDS,
    TONE_WORDS,
)
from .scenes import COLOURS, Scene, Thing, holds

_WORD = re.compile(r"[a-z]+|\d+|\.")
_COUNTED = ("shape", "object", "thing", "figure", "item")
_KINDS = {
    "plain": "plain",
    "shaded": "shaded",
    "gradient": "shaded",
    "darkens": "shaded",
    "grid": "ruled",
    "ruled": "ruled",
    "squared": "ruled",
}


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _lexicon() -> dict[tuple[str, ...], tuple[str, object]]:
    """Phrase to (kind, value); the longest phrase wins where several begin at one word."""
    table: dict[tuple[str, ...], tuple[str, object]] = {}

    def add(phrase: str, kind: str, value: object) -> None:
        table[_words(phrase)] = (kind, value)

    for colour in COLOURS:
        for word in COLOUR_WORDS.get(colour, (colour,)):
            add(word, "colour", colour)
    for kind, words in (("size", SIZE_WORDS), ("texture", TEXTURE_WORDS), ("tone", TONE_WORDS)):
        for value, phrases in words.items():
            for phrase in phrases:
                add(phrase, kind, value)
    for texture, phrases in TEXTURE_TAILS.items():
        for phrase in phrases:
            add(phrase, "tail", texture)
    for noun, shape in NOUNS.items():
        add(noun, "shape", shape)
        add(PLURALS.get(noun, noun + "s"), "shapes", shape)
    for word, kind in _KINDS.items():
        add(word, "kind", kind)
    for name, phrases in RELATION_WORDS.items():
        for phrase in phrases:
            add(phrase, "relation", name)
    for ends, spread in ((IN_ROW, lambda line: (1, line)), (IN_COLUMN, lambda line: (line, 1))):
        for line, phrases in enumerate(ends):
            for phrase in phrases:
                add(phrase.split("the ")[-1], "place", spread(line))
    for phrase, cell in SPOT_CELLS.items():
        add(phrase, "place", cell)
    for axis, lines in ((0, ROW_WORDS), (1, COLUMN_WORDS)):
        for line, phrases in enumerate(lines):
            for phrase in phrases:
                add(phrase.removeprefix("the "), "line", (axis, line))
    for value, word in enumerate(NUMBERS):
        add(word, "number", value)
        add(str(value), "number", value)
    for word in ("single", "only one"):
        add(word, "number", 1)
    for word in _COUNTED:
        add(word, "counted", None)
        add(word + "s", "counted", None)
    add("it", "it", None)
    for word in ("a", "an"):
        add(word, "new", None)
    add(".", "stop", ".")
    return table


_LEXICON = _lexicon()
_LONGEST = max(map(len, _LEXICON))


def events(text: str) -> list[tuple[str, object]]:
    """The text as (kind, value) pairs from the lexicon, in order; words it does not hold are passed over."""
    words, found, position = _words(text), [], 0
    while position < len(words):
        for length in range(min(_LONGEST, len(words) - position), 0, -1):
            event = _LEXICON.get(words[position : position + length])
            if event:
                found.append(event)
                position += length
                break
        else:
            position += 1
    return found


@dataclass
class Mention:
    """One object as the text speaks of it; what goes unsaid is None."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    cell: tuple[int, int] | None = None
    new: bool = False

    def fits(self, thing: Thing) -> bool:
        return all(
            said is None or said == getattr(thing, name)
            for name, said in vars(self).items()
            if name not in ("new", "cell")
        )


@dataclass
class Reading:
    """What a text claims. `relations` holds (mention, relation, mention)."""

    things: list[Mention] = field(default_factory=list)
    references: list[Mention] = field(default_factory=list)
    relations: list[tuple[Mention, str, Mention]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tones: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    broken: bool = False


def read(text: str) -> Reading:
    """Read a caption. A sentence must name as many places as new objects; else the reading is broken."""
    reading = Reading()
    sentence: list[tuple[str, object]] = []
    for event in [*events(text), ("stop", ".")]:
        if event == ("stop", "."):
            _read_sentence(sentence, reading)
            sentence = []
        else:
            sentence.append(event)
    return reading


def _read_sentence(sentence: list[tuple[str, object]], reading: Reading) -> None:
    mentions: list[Mention] = []
    places: list[tuple[int, int]] = []
    pending, line, number, bond, new = Mention(), None, None, None, False
    for kind, value in sentence:
        if kind in ("colour", "size", "texture"):
            setattr(pending, kind, value)
        elif kind == "shape":
            pending.shape, pending.new = value, new
            mentions.append(pending)
            if bond:
                reading.relations.append((mentions[-2] if len(mentions) > 1 else Mention(), bond, pending))
            pending, bond, new = Mention(), None, False
        elif kind == "tail" and mentions:
            mentions[-1].texture = value
        elif kind == "new":
            new = True
        elif kind == "place":
            cell = value
            if line:
                cell = (line[1], cell[1]) if line[0] == 0 else (cell[0], line[1])
            places.append(cell)
        elif kind == "line":
            line = value
        elif kind == "relation":
            bond = value
        elif kind == "it" and bond and mentions:
            # ", with a ring below it" follows the new object; " and, below it, a ring" comes before it.
            last = mentions[-1]
            if len(mentions) > len(places):
                reading.relations.append((last, bond, mentions[-2] if len(mentions) > 1 else Mention()))
            else:
                follower = Mention()
                reading.relations.append((follower, bond, last))
                pending = follower
            bond = None
        elif kind == "number":
            number = value
        elif kind == "counted" and number is not None:
            reading.counts.append(number)
            number = None
        elif kind == "tone":
            reading.tones.append(value)
        elif kind == "kind":
            reading.kinds.append(value)
    if mentions:  # "the star is large and striped"
        for name in ("colour", "size", "texture"):
            if getattr(pending, name) is not None:
                setattr(mentions[-1], name, getattr(pending, name))
    fresh = [mention for mention in mentions if mention.new]
    reading.references += [mention for mention in mentions if not mention.new]
    reading.broken |= len(fresh) != len(places)
    for mention, cell in zip(fresh, places, strict=False):
        mention.cell = cell
    reading.things += fresh


@dataclass(frozen=True)
class Verdict:
    """A caption against its scene. `right`: every object with its colour and place, and nothing invented.
    `flawless`: also every size, pattern, count, relation and background that is stated. `shares` counts, per
    attribute, how many objects of the scene had it stated rightly, of those that had it stated at all."""

    right: bool
    flawless: bool
    shares: dict[str, tuple[int, int]]


def judge(text: str, scene: Scene) -> Verdict:
    reading = read(text)
    said = [(mention.shape, mention.colour, mention.cell) for mention in reading.things]
    true = [(thing.shape, thing.colour, thing.cell) for thing in scene.things]
    right = not reading.broken and sorted(said, key=str) == sorted(true, key=str)
    right = right and all(count == len(true) for count in reading.counts)
    right = right and all(
        any(mention.shape == shape and mention.colour in (None, colour) for shape, colour, _ in true)
        for mention in reading.references
    )
    flawless = (
        right
        and all(scene.at(mention.cell) and mention.fits(scene.at(mention.cell)) for mention in reading.things)
        and all(any(mention.fits(thing) for thing in scene.things) for mention in reading.references)
        and all(_holds(scene, *claim) for claim in reading.relations)
        and all(tone == scene.background.tone for tone in reading.tones)
        and all(kind == scene.background.kind for kind in reading.kinds)
    )
    return Verdict(right, flawless, _shares(reading, scene))


def _holds(scene: Scene, a: Mention, bond: str, b: Mention) -> bool:
    return any(
        a.fits(one) and b.fits(other) and holds(bond, one, other)
        for one in scene.things
        for other in scene.things
    )


def _shares(reading: Reading, scene: Scene) -> dict[str, tuple[int, int]]:
    by_cell = {mention.cell: mention for mention in reading.things}
    shares = {name: [0, 0] for name in ("count", "place", "shape", "colour", "size", "texture", "tone")}
    shares["count"] = [int(len(reading.things) == len(scene.things)), 1]
    for thing in scene.things:
        mention = by_cell.get(thing.cell)
        shares["place"][0] += mention is not None
        shares["place"][1] += 1
        for name in ("shape", "colour", "size", "texture"):
            said = mention and getattr(mention, name)
            if said:
                shares[name][0] += said == getattr(thing, name)
                shares[name][1] += 1
    for tone in reading.tones:
        shares["tone"][0] += tone == scene.background.tone
        shares["tone"][1] += 1
    return {name: (right, said) for name, (right, said) in shares.items()}


@dataclass(frozen=True)
class Fact:
    """The one thing an answer must get right; `value` depends on the kind (see `stated`)."""

    kind: str
    value: object

    def stated(self, text: str, scene: Scene) -> bool:
        """Whether the text states this fact."""
        if self.kind == "caption":
            return judge(text, scene).right
        return stated(self.kind, text) == self.value


def stated(kind: str, text: str) -> object:
    """What the text says on a question of this kind; `...` where it says nothing of the sort."""
    if kind == "letter":
        letters = re.findall(r"answer is \(?([A-D])\b", text)
        return letters[-1] if letters else ...
    if kind == "yesno":
        words = [word for word in _words(text) if word in ("yes", "no")]
        return words[0] == "yes" if words else ...
    found = events(text)
    if kind in ("thing", "things"):
        pairs, colour = [], None
        for name, value in found:
            if name == "colour":
                colour = value
            elif name == "shape":
                pairs.append((value, colour))
                colour = None
        if kind == "things":
            return frozenset(pairs) or ...
        if pairs:
            return pairs[0]
        return None if {"nothing", "empty"} & set(_words(text)) else ...
    if kind == "count":
        if {"no", "none"} & set(_words(text)):
            return 0
        kind = "number"
    return next((value for name, value in found if name == kind), ...)
