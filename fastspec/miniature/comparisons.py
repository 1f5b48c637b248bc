"""Questions about several things: counts, relations and comparisons."""

from __future__ import annotations

from random import Random

from .lexicon import (
    NUMBERS,
    SIZE_WORDS,
    colour_word,
    described,
    listed,
    named,
    relation,
    say,
    sentence,
    shape_noun,
    spot,
)
from .questions import IN_PICTURE, Talk, Turn, subject_of
from .reading import Fact
from .scenes import COLOURS, RELATIONS, SHAPES, Scene, holds, pick


def total(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    if not talk.once("total"):
        return None
    count = len(scene.things)
    noun = pick(rng, ("shape", "object", "thing", "figure"))
    user = say(
        rng,
        "[how many {n}s [are there|do you see|can you count|are drawn]"
        + IN_PICTURE
        + "?|count the {n}s"
        + IN_PICTURE
        + ", please.|what is the number of {n}s"
        + IN_PICTURE
        + "?]",
        n=noun,
    )
    s = "" if count == 1 else "s"
    answer = sentence(
        rng,
        "[I [count|see|can see|find] {k} {n}{s}|there [{v}|{v}|{v} exactly] {k} {n}{s}|the [picture|image] "
        "[shows|has|contains] {k} {n}{s}|{k} {n}{s} [{v}|can be] [seen|shown|drawn]|{k}, as far as I can see].",
        k=NUMBERS[count], n=noun, s=s, v="is" if count == 1 else "are",
    )  # fmt: skip
    talk.focus = scene.things[0] if count == 1 else None
    return user, answer, Fact("count", count)


def count(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    """How many of one shape, colour or size."""
    kind = pick(rng, ("shape", "colour", "size"))
    present = rng.random() < 0.75
    pool = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZE_WORDS)}[kind]
    value = getattr(pick(rng, scene.things), kind) if present else pick(rng, pool)
    if not talk.once("some", kind, value):
        return None
    found = scene.where(**{kind: value})
    noun = pick(rng, ("shape", "object", "thing"))
    word = {
        "shape": lambda n: shape_noun(rng, value, n),
        "colour": lambda n: f"{colour_word(rng, value)} {noun}" + "s" * (n != 1),
        "size": lambda n: f"{pick(rng, SIZE_WORDS[value])} {noun}" + "s" * (n != 1),
    }[kind]
    user = say(
        rng,
        "[how many {w} [are there|do you see|can you find|are shown]" + IN_PICTURE
        + "|how many of [them|the shapes] are {w}]?",
        w=word(2),
    )  # fmt: skip
    if not found:
        answer = sentence(
            rng,
            "[there are no {w}|none[, there is nothing of that kind|, I see no {w}|]|I [see|find|count] no {w}"
            "|zero; no {w} are [shown|drawn]]" + IN_PICTURE + ".",
            w=word(2),
        )
    elif len(found) == 1:
        thing = found[0]
        answer = sentence(
            rng,
            "[there is [just|only|] one {w}, {p}|one[: the {t} {p}|, and it is {p}|]|I see one {w}, the {t} {p}"
            "|only one, the {t}].",
            w=word(1), p=spot(rng, thing.cell), t=described(rng, thing, rng.random() < 0.3, "never"),
        )  # fmt: skip
        talk.focus = thing
    else:
        answer = sentence(
            rng,
            "[there are {k} {w}|I [see|count|find] {k} {w}|{k}|{k} {w} are [shown|drawn]][|: {l}|: {l}].",
            k=NUMBERS[len(found)], w=word(2), l=listed(rng, [f"one {spot(rng, thing.cell)}" for thing in found]),
        )  # fmt: skip
        talk.focus = None
    return user, answer, Fact("count", len(found))


def position(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    if len(scene.things) < 2:
        return None
    thing, user, subject = subject_of(rng, scene, talk)
    other = pick(rng, [one for one in scene.things if one is not thing])
    true = [name for name in RELATIONS if holds(name, thing, other)]
    false = [name for name in RELATIONS if name not in true]
    asked = pick(rng, true if rng.random() < 0.5 else false)
    if not talk.once("relation", thing, other):
        return None
    question = say(rng, "is {s} {r} the {o}?", s=user, r=relation(rng, asked), o=named(rng, other, scene))
    if asked in true:
        answer = say(
            rng,
            "Yes, [{s} is|it is[ indeed|]|that is right, it is|{s} lies] {r} the {o}[|, {p}].",
            s=subject, r=relation(rng, asked), o=named(rng, other, scene), p=spot(rng, thing.cell),
        )  # fmt: skip
    else:
        answer = say(
            rng,
            "No, [{s} is|it is|it lies|in fact it is] {r} the {o}[|, {p}].",
            s=subject, r=relation(rng, pick(rng, true)), o=named(rng, other, scene), p=spot(rng, thing.cell),
        )  # fmt: skip
    return question, answer, Fact("yesno", asked in true)


def neighbour(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    """What lies on one side of a thing, where exactly one thing does."""
    if len(scene.things) < 2:
        return None
    thing, user, _ = subject_of(rng, scene, talk)
    sides = [name for name in RELATIONS if len(scene.related(name, thing)) == 1]
    if not sides:
        return None
    side = pick(rng, sides)
    if not talk.once("neighbour", thing, side):
        return None
    found = scene.related(side, thing)[0]
    question = say(rng, "[what|which shape] [is|lies|do you see] {r} {s}?", r=relation(rng, side), s=user)
    answer = sentence(
        rng,
        "[a {t}[| {p}|, and it is {p}]|there is a {t}[| {p}]|that is the {t}|the {t}[, {p}|]].",
        t=described(rng, found, rng.random() < 0.3, "never"), p=spot(rng, found.cell),
    )  # fmt: skip
    talk.focus = found
    return question, answer, Fact("thing", (found.shape, found.colour))


def bigger(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    pairs = [(a, b) for a in scene.things for b in scene.things if a.size == "large" and b.size == "small"]
    if not pairs:
        return None
    big, small = pick(rng, pairs)
    if not talk.once("bigger", big, small):
        return None
    more = rng.random() < 0.5
    answer_thing = big if more else small
    names = [named(rng, big, scene), named(rng, small, scene)]
    rng.shuffle(names)
    user = say(
        rng, "[which|which one] is {m}, the {a} or the {b}?", m=say(rng, "[bigger|larger]" if more else "smaller"),
        a=names[0], b=names[1],
    )  # fmt: skip
    answer = sentence(
        rng,
        "[the {t}[| is {m}| is the {m} one| is the {m} of the two]|it is the {t}|of the two, the {t} is {m}].",
        t=described(rng, answer_thing, False, "never"), m="bigger" if more else "smaller",
    )  # fmt: skip
    talk.focus = answer_thing
    return user, answer, Fact("thing", (answer_thing.shape, answer_thing.colour))


def same(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    if len(scene.things) < 2:
        return None
    a = pick(rng, scene.things)
    kind = pick(rng, ("colour", "size", "shape"))
    alike = [one for one in scene.things if one is not a and getattr(one, kind) == getattr(a, kind)]
    unlike = [one for one in scene.things if one is not a and getattr(one, kind) != getattr(a, kind)]
    b = pick(rng, alike if alike and (not unlike or rng.random() < 0.6) else unlike)
    if not talk.once("same", kind, a, b):
        return None
    if kind == "shape":
        one, two = spot(rng, a.cell), spot(rng, b.cell)
        user = say(
            rng,
            "[do the things {a} and {b} have the same shape|are the shapes {a} and {b} alike]?",
            a=one,
            b=two,
        )
    else:
        one, two = named(rng, a, scene, 1.0 * (kind == "size")), named(rng, b, scene, 1.0 * (kind == "size"))
        if kind == "colour" and any(len(scene.where(shape=thing.shape)) > 1 for thing in (a, b)):
            return None
        user = say(rng, "[do the {a} and the {b} have the same {k}|are the {a} and the {b} of the same {k}]?",
                   a=one, b=two, k=kind)  # fmt: skip
    words = {
        "colour": lambda thing: colour_word(rng, thing.colour),
        "size": lambda thing: pick(rng, SIZE_WORDS[thing.size]),
        "shape": lambda thing: f"a {shape_noun(rng, thing.shape)}",
    }[kind]
    talk.focus = None
    if b in alike:
        answer = say(rng, "Yes, [both are {w}|they do: both are {w}|each of them is {w}|they are both {w}].",
                     w=words(a))  # fmt: skip
    else:
        answer = say(
            rng,
            "No, [one is {w} and the other is {v}|the first is {w}, the second {v}|they differ: {w} and {v}].",
            w=words(a), v=words(b),
        )  # fmt: skip
    return user, answer, Fact("yesno", b in alike)


def others(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    """What else there is, besides the thing last spoken of."""
    if talk.focus is None or len(scene.things) < 2 or not talk.once("others"):
        return None
    rest = [thing for thing in scene.things if thing is not talk.focus]
    user = say(
        rng,
        "[what else [is there|do you see|can you see|is shown]|[are there|do you see] any other shapes"
        "|and what are the others|which other shapes are there]" + IN_PICTURE + "?",
    )
    size, texture = rng.random() < 0.3, pick(rng, ("patterned", "never"))
    items = [f"a {described(rng, thing, size, texture)} {spot(rng, thing.cell)}" for thing in rest]
    answer = sentence(
        rng, "[there is also|I also see|besides, there is|you can also see|there is|apart from it there is] {l}.",
        l=listed(rng, items),
    )  # fmt: skip
    talk.focus = rest[0] if len(rest) == 1 else None
    return user, answer, Fact("things", frozenset((one.shape, one.colour) for one in rest))
