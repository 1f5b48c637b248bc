"""Descriptions of a scene in one to four sentences."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .lexicon import (
    COLUMN_WORDS,
    IN_COLUMN,
    IN_ROW,
    NUMBERS,
    ROW_WORDS,
    SIZE_WORDS,
    TEXTURE_WORDS,
    TONE_WORDS,
    backdrop,
    described,
    listed,
    named,
    relation,
    say,
    sentence,
    spot,
    spot_name,
    tidy,
)
from .scenes import RELATIONS, Scene, Thing, holds, pick

REQUEST = (
    "[Please |][describe|caption|explain] [this|the] {it}[ to me|][| briefly| in your own words].",
    "[What is in|What does one see in|Tell me what is in|What can be seen in] [this|the] {it}?",
    "[What do you see|What can you see|What is shown|What is drawn][ here| in this {it}| in the {it}|]?",
    "[Write|Give me|I need|Provide] a [caption|description|short description] [of|for] [this|the] {it}.",
    "[Describe|Tell me about] [all the objects|everything|the shapes|what you see][ in the {it}|] and where they are.",
    "[Which|What] [objects|shapes|things] are in [this|the] {it}, and where[ are they|]?",
    "[Can|Could] you [describe|tell me] [what is here|what the {it} shows|what this {it} is of]?",
    "Describe the image.",
)
LENGTHS = {
    1: "[In one sentence, please.|One sentence is enough.|Use a single sentence.|Keep it to one sentence.|Be brief.]",
    2: "[In two sentences, please.|Two sentences are enough.|Use two sentences.|Keep it short.]",
    3: "[In three sentences, please.|Use three sentences.|Write three sentences.]",
    4: "[In four sentences, please.|Use four sentences.|In detail, please.|Be thorough.]",
}
HEADS = (
    "[There is|I can see|I see|You can see|We see|We can see|Here we have|One can make out|Someone has drawn]",
    "[The|This] [picture|image|drawing|scene] [shows|contains|has|presents|depicts]",
    "[It shows|What I see is|We are looking at|This is a picture of|In this [picture|image], there is]",
)
STANDS = "[sits|lies|is|rests|stands|appears|is placed|is drawn|can be seen|is visible|is found]"
FINDS = "[there is|sits|lies|we find|you find|we see|rests|stands|is|appears|one sees]"
HOLDS = "[holds|contains|is taken by|is home to|shows|has|carries|is filled by]"
JOINS = (", and ", " and ", ", while ", "; ", ", whereas ")
EMPTY = (
    "[Nothing else is [shown|visible|there|drawn]|The [other places|rest] stay empty|That is all"
    "|There is nothing more to see|All the other places are empty]"
)
GROUND = (
    "[The background is|All of it is on|The drawing is on|It is set against|Behind it all there is"
    "|Everything is seen against] {ground}"
)
ALONE = (
    "[There is one|I see a single|The [picture|image] shows only one|Just one] [shape|object|thing|figure]"
)
ALL = (" and nothing else besides", ", and that is all there is to see", ", with nothing else around it")
SET = (", all on", ", on", " and all of it on", ", all against", ", against")
THINGS = "[shapes|objects|things|figures|items]"
COUNTS = (
    f"[There are {{n}} {THINGS}|I [see|count] {{n}} {THINGS}|The [picture|image|scene] [shows|has] {{n}} {THINGS}"
    f"|{{n}} {THINGS} are [shown|visible|drawn]|In all, there are {{n}} {THINGS}]"
)


@dataclass(frozen=True)
class Style:
    """What one caption says of every object besides its colour, shape and place."""

    size: bool
    texture: str

    @classmethod
    def random(cls, rng: Random, wordy: bool) -> Style:
        if wordy:
            return cls(True, "always")
        return cls(rng.random() < 0.55, pick(rng, ("always", "patterned", "patterned", "never")))


def request(rng: Random, sentences: int | None) -> str:
    """What the user asks; names the number of sentences unless that is None."""
    it = pick(rng, ("picture", "image", "drawing", "scene", "image", "picture"))
    text = sentence(rng, pick(rng, REQUEST), it=it)
    return text if sentences is None else f"{text} {say(rng, LENGTHS[sentences])}"


def _ordered(rng: Random, things: tuple[Thing, ...]) -> list[Thing]:
    things = list(things)
    orders = (
        lambda thing: thing.cell,
        lambda thing: thing.cell[::-1],
        lambda thing: (-thing.cell[0], thing.cell[1]),
        lambda thing: (-thing.radius, thing.cell),
    )
    if rng.random() < 0.3:
        rng.shuffle(things)
    else:
        things.sort(key=pick(rng, orders))
    return things


def _joined(rng: Random, clauses: list[str]) -> str:
    text = clauses[0]
    for clause in clauses[1:]:
        text += pick(rng, JOINS) + clause
    return text


def _by_lines(rng: Random, things: list[Thing], style: Style, axis: int) -> str:
    """Row by row (axis 0) or column by column (axis 1)."""
    names, ends = ((ROW_WORDS, IN_ROW), (COLUMN_WORDS, IN_COLUMN))[axis]
    clauses = []
    for line in sorted({thing.cell[axis] for thing in things}):
        inside = sorted((thing for thing in things if thing.cell[axis] == line), key=lambda thing: thing.cell)
        items = [
            f"a {described(rng, thing, style.size, style.texture)} {pick(rng, ends[thing.cell[1 - axis]])}"
            for thing in inside
        ]
        name = pick(rng, names[line])
        start = f"{name} {say(rng, HOLDS)}" if rng.random() < 0.5 else f"in {name} {say(rng, FINDS)}"
        clauses.append(f"{start} {listed(rng, items)}")
    return "; ".join(clauses) if rng.random() < 0.5 else _joined(rng, clauses)


def _body(rng: Random, things: list[Thing], style: Style) -> str:
    """One sentence, without its full stop, that places each of these things."""

    def a(thing: Thing) -> str:
        return f"a {described(rng, thing, style.size, style.texture)}"

    def placed(thing: Thing) -> str:
        return f"{a(thing)} {say(rng, STANDS)} {spot(rng, thing.cell)}"

    plan = int(8 * rng.random())
    if plan == 0:
        head = say(rng, pick(rng, HEADS))
        return f"{head} {listed(rng, [f'{a(thing)} {spot(rng, thing.cell)}' for thing in things])}"
    if plan == 1:
        return _joined(rng, [placed(thing) for thing in things])
    if plan == 2:
        return _joined(rng, [f"{spot(rng, thing.cell)} {say(rng, FINDS)} {a(thing)}" for thing in things])
    if plan == 3:
        return "; ".join(f"{spot_name(rng, thing.cell)}: {a(thing)}" for thing in things)
    if plan == 4:
        return _joined(
            rng, [f"the {spot_name(rng, thing.cell)} {say(rng, HOLDS)} {a(thing)}" for thing in things]
        )
    if plan == 5 and len(things) > 1:
        return _by_lines(rng, things, style, int(2 * rng.random()))
    if plan == 6 and len(things) > 1:
        first, second, *others = things
        bond = relation(rng, pick(rng, [name for name in RELATIONS if holds(name, second, first)]))
        where = spot(rng, second.cell)
        link = (
            f", with {a(second)} {bond} it {where}"
            if rng.random() < 0.5
            else f" and, {bond} it, {a(second)} {where}"
        )
        return _joined(rng, [placed(first) + link, *(placed(thing) for thing in others)])
    verb = say(rng, STANDS)
    rest = [f"{a(thing)} {spot(rng, thing.cell)}" for thing in things[1:]]
    return listed(rng, [f"{a(things[0])} {verb} {spot(rng, things[0].cell)}", *rest])


def _remark(rng: Random, scene: Scene, grounded: bool) -> str:
    """A closing sentence about something already named, or about the background if it was not yet."""
    things = list(scene.things)
    thing = pick(rng, things)
    kind = int((3 if grounded else 4) * rng.random())
    if kind == 0 and len(things) > 1:
        other = pick(rng, [one for one in things if one is not thing])
        bond = pick(rng, [name for name in RELATIONS if holds(name, thing, other)])
        return say(
            rng,
            "The {a} [lies|is|sits|stands|appears] {bond} the {b}",
            a=named(rng, thing, scene),
            bond=relation(rng, bond),
            b=named(rng, other, scene),
        )
    if kind == 1:
        size, texture = pick(rng, SIZE_WORDS[thing.size]), pick(rng, TEXTURE_WORDS[thing.texture])
        text = "The {a} is [{size}|{texture}|{size} and {texture}|{texture} and {size}][| in appearance]"
        return say(rng, text, a=named(rng, thing, scene), size=size, texture=texture)
    if kind == 2:
        return say(rng, EMPTY)
    return say(rng, GROUND, ground=backdrop(rng, scene))


def _opening(rng: Random, scene: Scene) -> str:
    count = len(scene.things)
    text = say(rng, ALONE if count == 1 else COUNTS, n=NUMBERS[count])
    return text if rng.random() < 0.4 else f"{text} on {backdrop(rng, scene)}"


def compose(rng: Random, scene: Scene, sentences: int, wordy: bool = False) -> str:
    """The caption. `wordy` says everything about each object, for scenes too simple to fill a sentence."""
    style, things = Style.random(rng, wordy), _ordered(rng, scene.things)
    extras = min(sentences - 1, int(3 * rng.random()))
    extras = max(extras, sentences - len(things))
    opening = extras > 0 and rng.random() < 0.6
    bodies = sentences - extras
    cuts = sorted(rng.sample(range(1, len(things)), bodies - 1))
    groups = [things[a:b] for a, b in zip([0, *cuts], [*cuts, len(things)], strict=True)]
    parts = [_body(rng, group, style) for group in groups]
    if sentences == 1 and (wordy or rng.random() < 0.4):
        parts[0] += f"{pick(rng, SET)} {backdrop(rng, scene)}"
    if sentences == 1 and wordy:
        parts[0] += pick(rng, ALL)
    if opening:
        parts.insert(0, _opening(rng, scene))
    while len(parts) < sentences:
        grounded = any(word in part for part in parts for word in TONE_WORDS[scene.background.tone])
        remark = _remark(rng, scene, grounded)
        if remark not in parts:
            parts.append(remark)
    return " ".join(part[0].upper() + part[1:] + "." for part in map(tidy, parts))
