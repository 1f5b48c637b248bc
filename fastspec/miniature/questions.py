"""Questions about one thing, one place or the background, each with its answer and the fact in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from .lexicon import (
    SIZE_WORDS,
    TEXTURE_WORDS,
    backdrop,
    colour_word,
    described,
    named,
    say,
    sentence,
    shape_noun,
    spot,
    spot_name,
)
from .reading import Fact
from .scenes import CELLS, COLOURS, SHAPES, Scene, Thing, pick

Turn = tuple[str, str, Fact]  # what the user says, what the assistant says, the fact in it
IN_PICTURE = "[| in the picture| in the image| here| in this picture]"


@dataclass
class Talk:
    """What has been said so far: the thing that "it" means, and the questions already asked."""

    focus: Thing | None = None
    asked: set = field(default_factory=set)

    def once(self, *question: object) -> bool:
        """Whether this question is new; it counts as asked from now on."""
        fresh = question not in self.asked
        self.asked.add(question)
        return fresh


def subject_of(rng: Random, scene: Scene, talk: Talk) -> tuple[Thing, str, str]:
    """A thing, the user's words for it and the answer's: often the one that was just spoken of."""
    if talk.focus is not None and rng.random() < 0.55:
        thing = talk.focus
        user = "it" if rng.random() < 0.8 else f"that {shape_noun(rng, thing.shape)}"
    else:
        thing = pick(rng, scene.things)
        user = f"the {named(rng, thing, scene)}"
    answer = "it" if rng.random() < 0.5 else f"the {named(rng, thing, scene)}"
    talk.focus = thing
    return thing, user, answer


def colour(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    if rng.random() < 0.4:
        thing = pick(rng, scene.things)
        user, subject = say(rng, "the [shape|object|thing] {p}", p=spot(rng, thing.cell)), "it"
        talk.focus = thing
    elif talk.focus is not None and rng.random() < 0.5:
        thing, user, subject = talk.focus, "it", "it"
    else:
        thing = pick(rng, scene.things)
        if len(scene.where(shape=thing.shape)) > 1:
            return None
        noun = shape_noun(rng, thing.shape)
        user, subject = f"the {noun}", pick(rng, ("it", f"the {noun}"))
        talk.focus = thing
    if not talk.once("colour", thing):
        return None
    question = say(
        rng,
        "[[what|which] colo[u|u|]r [is {s}|does {s} have]|what is the colo[u|u|]r of {s}"
        "|what about {s}: which colour is it]?",
        s=user,
    )
    answer = sentence(
        rng,
        "[{s} is {c}|{s} is {c} in colour|it has a {c} colour|{c}|I would call it {c}|{s} is painted {c}"
        "|its colour is {c}].",
        s=subject, c=colour_word(rng, thing.colour),
    )  # fmt: skip
    return question, answer, Fact("colour", thing.colour)


def size(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    thing, user, subject = subject_of(rng, scene, talk)
    if not talk.once("size", thing):
        return None
    question = say(
        rng,
        "[how [big|large] is {s}|is {s} [large or small|big or little|small or large]"
        "|what size [is {s}|does {s} have]]?",
        s=user,
    )  # fmt: skip
    answer = sentence(
        rng, "[{s} is {z}|it is a {z} one|{z}|it is [rather|quite] {z}|{s} looks {z}].",
        s=subject, z=pick(rng, SIZE_WORDS[thing.size]),
    )  # fmt: skip
    return question, answer, Fact("size", thing.size)


def texture(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    thing, user, subject = subject_of(rng, scene, talk)
    if not talk.once("texture", thing):
        return None
    question = say(
        rng,
        "[[what|which] pattern does {s} have|is {s} solid, striped, dotted or checked|what is the texture of {s}"
        "|how is {s} filled|does {s} have a pattern]?",
        s=user,
    )  # fmt: skip
    answer = sentence(
        rng, "[{s} is {x}|it is {x}|it looks {x}|{x}|{s} [has|shows] a {x} [pattern|texture|filling]].",
        s=subject, x=pick(rng, TEXTURE_WORDS[thing.texture]),
    )  # fmt: skip
    return question, answer, Fact("texture", thing.texture)


def place(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    thing, user, subject = subject_of(rng, scene, talk)
    if not talk.once("place", thing):
        return None
    question = say(
        rng,
        "[where [is|do you see|can I find|exactly is] {s}|in which part of the [picture|image] is {s}"
        "|what is the position of {s}|whereabouts is {s}]?",
        s=user,
    )
    answer = sentence(
        rng,
        "[{s} [is|lies|sits|is placed|is drawn|can be found] {p}|you [find|can see] it {p}|{p}|look {p}].",
        s=subject, p=spot(rng, thing.cell),
    )  # fmt: skip
    return question, answer, Fact("place", thing.cell)


def content(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    """What is at a place; sometimes nothing."""
    cell = pick(rng, scene.things).cell if rng.random() < 0.8 else pick(rng, CELLS)
    if not talk.once("content", cell):
        return None
    user = say(
        rng,
        "[what [is|do you see|can be seen|lies] {p}|which shape is {p}|is there anything {p}|what does the {n} hold]"
        + IN_PICTURE + "?",
        p=spot(rng, cell), n=spot_name(rng, cell),
    )  # fmt: skip
    thing = talk.focus = scene.at(cell)
    if thing is None:
        answer = sentence(
            rng,
            "[nothing[ is there|; that place is empty| at all]|there is nothing {p}|that [place|spot|part] is empty"
            "|I see nothing [there|{p}]].",
            p=spot(rng, cell),
        )
        return user, answer, Fact("thing", None)
    answer = sentence(
        rng,
        "[there is a {t}[| {p}| there]|a {t}|it is a {t}|I see a {t}[| there]|that is a {t}|you find a {t} there].",
        t=described(rng, thing, rng.random() < 0.5, pick(rng, ("always", "patterned", "never"))), p=spot(rng, cell),
    )  # fmt: skip
    return user, answer, Fact("thing", (thing.shape, thing.colour))


def exists(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    model = pick(rng, scene.things)
    shape, colour = model.shape, model.colour
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            shape = pick(rng, SHAPES)
        else:
            colour = pick(rng, tuple(COLOURS))
    if not talk.once("exists", shape, colour):
        return None
    words = f"{colour_word(rng, colour)} {shape_noun(rng, shape)}"
    user = say(
        rng,
        "[is there a {w}|do you see a {w}|can you [see|find] a {w}|does the [picture|image] [show|contain|have] a {w}"
        "|is a {w} shown]" + IN_PICTURE + "?",
        w=words,
    )  # fmt: skip
    found = scene.where(shape=shape, colour=colour)
    if found:
        talk.focus = found[0]
        answer = say(
            rng,
            "Yes, [there is[ one|] {p}|it [is|lies|sits] {p}|a {w} [is|sits|can be seen] {p}|I see it {p}].",
            p=spot(rng, found[0].cell), w=words,
        )  # fmt: skip
    else:
        other = scene.where(shape=shape) or scene.where(colour=colour)
        answer = say(
            rng,
            "No, [there is no {w}|I [see|find] no {w}|there is not|nothing like that is shown]"
            "[|, [only|just] a {o}|; there is a {o} {p}|, but there is a {o}].",
            w=words, o=described(rng, other[0], False, "never"), p=spot(rng, other[0].cell),
        )  # fmt: skip
        talk.focus = None
    return user, answer, Fact("yesno", bool(found))


def ground(rng: Random, scene: Scene, talk: Talk) -> Turn | None:
    if not talk.once("ground"):
        return None
    user = say(
        rng,
        "[what [does the background look like|is the background like|is behind the shapes|kind of background is it]"
        "|which colour is the background]?",
    )
    answer = sentence(
        rng,
        "[it is {g}|the shapes are on {g}|I see {g}|behind them is {g}|all of it is on {g}|{g}].",
        g=backdrop(rng, scene),
    )
    talk.focus = None
    return user, answer, Fact("tone", scene.background.tone)
