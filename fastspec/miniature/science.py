"""Multiple-choice questions about a scene, answered with a chain of thought and a letter."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .lexicon import (
    COLUMNS,
    NUMBERS,
    ROWS,
    SIZE_WORDS,
    TEXTURE_WORDS,
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
from .scenes import CELLS, COLOURS, RELATIONS, SHAPES, Scene, Thing, pick

CORNERS = {"triangle": 3, "square": 4, "diamond": 4, "circle": 0, "ring": 0}
MIXTURES = {
    frozenset(("red", "yellow")): "orange",
    frozenset(("blue", "yellow")): "green",
    frozenset(("red", "blue")): "purple",
    frozenset(("red", "white")): "pink",
    frozenset(("red", "green")): "brown",
}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
CLOSINGS = (
    "[Think step by step.|Explain, then give the letter.|Reason first, then answer.|Give your reasoning and the letter."
    "|Answer with the letter and a reason.|Explain your answer.|Show how you got there.|Work it out step by step.]"
)


@dataclass(frozen=True)
class Problem:
    question: str
    options: list[str]  # the right one first; `pose` shuffles them
    thoughts: str


def _spoken(rng: Random, thing: Thing) -> str:
    return f"{colour_word(rng, thing.colour)} {shape_noun(rng, thing.shape)}"


def _survey(rng: Random, things: list[Thing]) -> str:
    """A first thought that looks at some things."""
    items = [f"a {described(rng, thing, False, 'never')} {spot(rng, thing.cell)}" for thing in things]
    return sentence(
        rng,
        "[I see|there is|the picture shows|looking at the picture, I find|first I look: there is|we have] {l}.",
        l=listed(rng, items),
    )  # fmt: skip


def _numbers(rng: Random, right: int, low: int, high: int) -> list[str]:
    """The right number and three wrong ones near it, as words up to six."""
    near = [value for value in range(max(low, right - 3), min(high, right + 3) + 1) if value != right]
    values = [right, *rng.sample(near, 3)]
    return [NUMBERS[value] if value < len(NUMBERS) else str(value) for value in values]


def _absent(rng: Random, scene: Scene, count: int) -> list[tuple[str, str]]:
    """(shape, colour) pairs that the scene lacks, most of them like something it holds."""
    present = {(thing.shape, thing.colour) for thing in scene.things}
    found: list[tuple[str, str]] = []
    while len(found) < count:
        shape, colour = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
        if rng.random() < 0.4:
            shape = pick(rng, scene.things).shape
        elif rng.random() < 0.4:
            colour = pick(rng, scene.things).colour
        if (shape, colour) not in present and (shape, colour) not in found:
            found.append((shape, colour))
    return found


def _pairs(rng: Random, pairs: list[tuple[str, str]]) -> list[str]:
    return [f"{colour_word(rng, colour)} {shape_noun(rng, shape)}" for shape, colour in pairs]


def _count(rng: Random, scene: Scene) -> Problem:
    kind = pick(rng, ("all", "shape", "colour", "size"))
    if kind == "all":
        found, word = list(scene.things), lambda n: pick(rng, ("shape", "object")) + "s" * (n != 1)
    else:
        value = getattr(pick(rng, scene.things), kind)
        found = scene.where(**{kind: value})
        word = {
            "shape": lambda n: shape_noun(rng, value, n),
            "colour": lambda n: f"{colour_word(rng, value)} object" + "s" * (n != 1),
            "size": lambda n: f"{pick(rng, SIZE_WORDS[value])} object" + "s" * (n != 1),
        }[kind]
    count = len(found)
    thoughts = _survey(rng, found) + " " + sentence(
        rng,
        "[that makes {k} {w}|so there [{v}|{v} exactly] {k} {w}|counting them gives {k}|together that is {k}"
        "|this gives {k} {w} in all].",
        k=NUMBERS[count], w=word(count), v="is" if count == 1 else "are",
    )  # fmt: skip
    question = sentence(rng, "[how many {w} [are there|does the picture show|can be seen]|what is the number of {w}]?",
                        w=word(2))  # fmt: skip
    return Problem(question, _numbers(rng, count, 0, 6), thoughts)


def _present(rng: Random, scene: Scene) -> Problem:
    thing = pick(rng, scene.things)
    absent = _pairs(rng, _absent(rng, scene, 3))
    question = sentence(rng, "[which of these [is|can be seen|is shown|is drawn] in the picture|which one does the "
                        "picture show|what can be found in the image]?")  # fmt: skip
    thoughts = _survey(rng, list(scene.things)) + " " + sentence(
        rng,
        "[of the four, only the {t} is [there|among them]|the {t} is the only one [listed|of the options]"
        "|the others are not in the picture, but the {t} is].",
        t=_spoken(rng, thing),
    )  # fmt: skip
    return Problem(question, [_spoken(rng, thing), *absent], thoughts)


def _missing(rng: Random, scene: Scene) -> Problem | None:
    if len(scene.things) < 3:
        return None
    gone = _pairs(rng, _absent(rng, scene, 1))[0]
    present = rng.sample(scene.things, 3)
    question = sentence(
        rng, "[which of these is [not in the picture|missing|not shown]|which one does the picture not show]?"
    )
    thoughts = (
        _survey(rng, list(scene.things))
        + " "
        + sentence(
            rng,
            "[there is no {t}|a {t} is not among them|I do not see a {t}|what is missing is the {t}].",
            t=gone,
        )
    )
    return Problem(question, [gone, *(_spoken(rng, thing) for thing in present)], thoughts)


def _relation(rng: Random, scene: Scene) -> Problem | None:
    choices = [
        (thing, name) for thing in scene.things for name in RELATIONS if len(scene.related(name, thing)) == 1
    ]
    if not choices:
        return None
    thing, name = pick(rng, choices)
    found = scene.related(name, thing)[0]
    wrong = [(one.shape, one.colour) for one in scene.things if one not in (thing, found)][:3]
    wrong += _absent(rng, scene, 3 - len(wrong))
    bond = relation(rng, name)
    question = sentence(
        rng, "[which object|what|which of these] [is|lies] {r} the {t}?", r=bond, t=named(rng, thing, scene)
    )
    thoughts = sentence(
        rng,
        "[the {t} [is|lies] {p}. {R} it [is|lies|there is] the {f}, {q}"
        "|first I find the {t} {p}. The {f} is {q}, so it is {r} the {t}"
        "|the {t} is {p} and the {f} {q}. So the {f} lies {r} it].",
        t=_spoken(rng, thing), f=_spoken(rng, found), p=spot(rng, thing.cell), q=spot(rng, found.cell),
        r=bond, R=relation(rng, name).capitalize(),
    )  # fmt: skip
    return Problem(question, [_spoken(rng, found), *_pairs(rng, wrong)], thoughts)


def _extreme(rng: Random, scene: Scene) -> Problem | None:
    if len(scene.things) < 2:
        return None
    axis, sign, words = pick(
        rng,
        (
            (1, 1, "[furthest to the left|furthest left]"),
            (1, -1, "[furthest to the right|furthest right]"),
            (0, 1, "[highest|nearest to the top]"),
            (0, -1, "[lowest|nearest to the bottom]"),
        ),
    )
    first, second, *_ = ranked = sorted(scene.things, key=lambda thing: sign * thing.cell[axis])
    if first.cell[axis] == second.cell[axis]:
        return None
    words = say(rng, words)
    wrong = [(one.shape, one.colour) for one in ranked[1:]]
    wrong += _absent(rng, scene, 3 - len(wrong))
    question = sentence(rng, "which [object|shape|of these] is [drawn|placed|] {w}?", w=words)
    thoughts = _survey(rng, list(scene.things)) + " " + sentence(
        rng, "[of these, the {t} is {w}|the one {w} is the {t}|no other is as far that way as the {t}].",
        t=_spoken(rng, first), w=words,
    )  # fmt: skip
    return Problem(question, [_spoken(rng, first), *_pairs(rng, wrong)], thoughts)


def _corners(rng: Random, scene: Scene) -> Problem | None:
    things = [thing for thing in scene.things if thing.shape in CORNERS]
    if not things or (len(things) == 1 and rng.random() < 0.5):
        return None
    chosen = things if len(things) <= 2 else rng.sample(things, 2)
    total = sum(CORNERS[thing.shape] for thing in chosen)
    names = listed(rng, [f"the {named(rng, thing, scene)}" for thing in chosen])
    asked = (
        "how many corners do {n} have[ together|]?" if len(chosen) > 1 else "how many corners does {n} have?"
    )
    question = sentence(rng, asked, n=names)
    facts = [
        say(rng, "the {t} {p} has {k} corners", t=shape_noun(rng, thing.shape), p=spot(rng, thing.cell),
            k=NUMBERS[CORNERS[thing.shape]] if CORNERS[thing.shape] else pick(rng, ("zero", "no")))
        for thing in chosen
    ]  # fmt: skip
    thoughts = sentence(rng, "{f}.", f=listed(rng, facts))
    if len(chosen) > 1:
        a, b = (CORNERS[thing.shape] for thing in chosen)
        thoughts += " " + say(rng, "[{a} + {b} = {c}.|{a} and {b} make {c}.|Together that is {a} + {b} = {c}.]",
                              a=a, b=b, c=total)  # fmt: skip
    wrong = rng.sample([value for value in (0, 3, 4, 5, 6, 7, 8, 10) if value != total], 3)
    return Problem(question, [str(value) for value in (total, *wrong)], thoughts)


def _weight(rng: Random, scene: Scene) -> Problem:
    light, heavy = 2 + int(2 * rng.random()), 4 + int(3 * rng.random())
    unit = pick(rng, ("kg", "grams", "coins"))
    verb = "costs" if unit == "coins" else "weighs"
    small, large = scene.where(size="small"), scene.where(size="large")
    question = sentence(
        rng,
        "[a|each|every] small object {v} {l} {u} and a large one {h} {u}. [What is the sum|How much is it together"
        "|What do all objects make together]?",
        v=verb, l=light, h=heavy, u=unit,
    )  # fmt: skip
    parts, sums = [], []
    for things, value, word in ((small, light, "small"), (large, heavy, "large")):
        if things:
            items = listed(rng, [f"the {named(rng, thing, scene, 0.8)}" for thing in things])
            parts.append(say(rng, "{i} {v} {w}", i=items, v="is" if len(things) == 1 else "are", w=word))
            sums.append(f"{len(things)} x {value} = {len(things) * value}")
    total = len(small) * light + len(large) * heavy
    thoughts = sentence(rng, "{p}.", p=listed(rng, parts, pick(rng, ("and", "while"))))
    thoughts += " " + sentence(rng, "[that gives|we get|this makes] {s}.", s=listed(rng, sums))
    if len(sums) == 2:
        thoughts += f" {len(small) * light} + {len(large) * heavy} = {total}."
    wrong = rng.sample([v for v in range(max(1, total - 5), total + 6) if v != total], 3)
    return Problem(question, [f"{value} {unit}" for value in (total, *wrong)], thoughts)


def _removal(rng: Random, scene: Scene) -> Problem | None:
    if len(scene.things) < 2:
        return None
    kind = pick(rng, ("shape", "colour", "size", "texture"))
    value = getattr(pick(rng, scene.things), kind)
    gone = scene.where(**{kind: value})
    word = {
        "shape": lambda: shape_noun(rng, value),
        "colour": lambda: f"{colour_word(rng, value)} object",
        "size": lambda: f"{pick(rng, SIZE_WORDS[value])} object",
        "texture": lambda: f"{pick(rng, TEXTURE_WORDS[value])} object",
    }[kind]()
    left = len(scene.things) - len(gone)
    question = sentence(
        rng,
        "[if every {w} is [taken away|removed]|after removing every {w}], how many objects [remain|are left]?",
        w=word,
    )
    thoughts = _survey(rng, list(scene.things)) + " " + sentence(
        rng,
        "[taking away {g} leaves {k}|without {g}, {k} [would be left|remain]|{g} [goes|would go], so {n} - {m} = {d}].",
        g=listed(rng, [f"the {_spoken(rng, thing)}" for thing in gone]), k=NUMBERS[left], n=len(scene.things),
        m=len(gone), d=left,
    )  # fmt: skip
    return Problem(question, _numbers(rng, left, 0, 5), thoughts)


def _plain(cell: tuple[int, int]) -> str:
    if cell == (1, 1):
        return "centre"
    return " ".join(word for word in (ROWS[cell[0]], COLUMNS[cell[1]]) if word != "middle")


def _move(rng: Random, scene: Scene) -> Problem | None:
    thing = pick(rng, scene.things)
    step = pick(rng, tuple(STEPS))
    row, column = thing.cell[0] + STEPS[step][0], thing.cell[1] + STEPS[step][1]
    if not (0 <= row <= 2 and 0 <= column <= 2):
        return None
    goal = (row, column)
    name = named(rng, thing, scene)
    words = step if step in ("up", "down") else f"to the {step}"
    question = sentence(
        rng,
        "[the {t} moves one [step|place] {w}. Where is it then"
        "|if the {t} moved one [step|place] {w}, where would it be]?",
        t=name, w=words,
    )  # fmt: skip
    thoughts = sentence(
        rng,
        "[[now|at first] the {t} is {p}|the {t} starts {p}|I find the {t} {p}]. "
        "One [step|place] {w} [of there|from there] [is|lies] the {g}.",
        t=name, p=spot(rng, thing.cell), w=words, g=_plain(goal),
    )  # fmt: skip
    wrong = rng.sample([cell for cell in CELLS if cell != goal], 3)
    return Problem(question, [_plain(cell) for cell in (goal, *wrong)], thoughts)


def _mixture(rng: Random, scene: Scene) -> Problem | None:
    pairs = [
        (a, b) for a in scene.things for b in scene.things if frozenset((a.colour, b.colour)) in MIXTURES
    ]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    mixed = MIXTURES[frozenset((a.colour, b.colour))]
    one, two = spot(rng, a.cell), spot(rng, b.cell)
    question = sentence(
        rng,
        "[what colour do you get|which colour comes out] if you mix the paint of the [object|shape] {a} "
        "with that of the [one|object] {b}?",
        a=one, b=two,
    )  # fmt: skip
    thoughts = sentence(
        rng, "the {s} {p} is {a} and the {t} {q} is {b}. {A} and {b} [make|give|mixed give] {c}.",
        s=shape_noun(rng, a.shape), t=shape_noun(rng, b.shape), p=one, q=two, a=a.colour, b=b.colour,
        A=a.colour.capitalize(), c=mixed,
    )  # fmt: skip
    wrong = rng.sample([colour for colour in COLOURS if colour != mixed], 3)
    return Problem(question, [mixed, *wrong], thoughts)


def _which(rng: Random, scene: Scene) -> Problem | None:
    """Which object has a given size or texture, where only one has."""
    kind = pick(rng, ("size", "texture", "texture"))
    single = [thing for thing in scene.things if len(scene.where(**{kind: getattr(thing, kind)})) == 1]
    if not single or len(scene.things) < 2:
        return None
    thing = pick(rng, single)
    value = getattr(thing, kind)
    words = (SIZE_WORDS if kind == "size" else TEXTURE_WORDS)[value]
    wrong = [(one.shape, one.colour) for one in scene.things if one is not thing]
    wrong += _absent(rng, scene, 3 - len(wrong))
    facts = [
        f"the {_spoken(rng, one)} is {pick(rng, (SIZE_WORDS if kind == 'size' else TEXTURE_WORDS)[getattr(one, kind)])}"
        for one in scene.things
    ]
    thoughts = sentence(rng, "{f}. [So it is|This leaves|Only one fits:] the {t}.", f=listed(rng, facts),
                        t=_spoken(rng, thing))  # fmt: skip
    question = sentence(rng, "which [object|shape|of these] is {w}?", w=pick(rng, words))
    return Problem(question, [_spoken(rng, thing), *_pairs(rng, wrong)], thoughts)


PROBLEMS = (
    *(_count, _count, _present, _missing, _relation, _relation, _extreme, _corners, _corners),
    *(_weight, _removal, _move, _mixture, _mixture, _which, _which),
)


def pose(rng: Random, scene: Scene) -> tuple[str, str, str]:
    """(what the user asks, the reasoned answer, the letter)."""
    problem = None
    while problem is None or len(set(problem.options)) < 4:
        problem = pick(rng, PROBLEMS)(rng, scene)
    order = [0, 1, 2, 3]
    rng.shuffle(order)
    letter = "ABCD"[order.index(0)]
    glue = pick(rng, ("\n", "\n", " ", ", "))
    options = glue.join(
        f"({label}) {problem.options[index]}" for label, index in zip("ABCD", order, strict=True)
    )
    user = f"{problem.question}{glue if glue != ', ' else ' '}{options}"
    if rng.random() < 0.75:
        user += (
            ("\n" if glue == "\n" else "." if glue == ", " else "")
            + " " * (glue != "\n")
            + say(rng, CLOSINGS)
        )
    # The option in its own words comes before its letter: the letter is then a matter of finding those words.
    chosen = say(rng, "[That is|So it is|This is] {o}[, so the answer is|. The answer is|: the answer is] {l}.",
                 o=problem.options[0], l=letter)  # fmt: skip
    return user, f"{problem.thoughts} {chosen}", letter
