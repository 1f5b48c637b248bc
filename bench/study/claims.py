"""What of the paper's claims holds, judged by the figures, and which tokens are rejected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bench.study.kinds import OTHER, VISUAL
from bench.study.markdown import table
from bench.study.measure import GAMMAS, PAPER_DRAFTS, TASK_NAMES
from bench.study.rows import only

PAPER_MBSU = 2.37
#: What a memory-bound speed-up must reach everywhere for a draft to be called good.
GOOD_MBSU = 1.5


def claims(record: dict[str, Any]) -> str:
    """The paper's claims, one by one."""

    def row(task: str, draft: str, gamma: int, heat: float) -> dict[str, Any]:
        part = "greedy" if heat == 0 else "chains"
        return only(record, part=part, task=task, draft=draft, shape=f"chain {gamma}", rule="block")

    cases = [(task, gamma) for task in TASK_NAMES for gamma in GAMMAS]
    speedups = [row(task, "ft", gamma, 0.0)["mbsu"] for task, gamma in cases]
    rises = {
        (other, heat): sum(
            row(task, one, gamma, heat)["tau"] < row(task, other, gamma, heat)["tau"] for task, gamma in cases
        )
        for one, other in pairwise(PAPER_DRAFTS[:3])
        for heat in (0.0, 1.0)
    }
    body = [
        [
            f"{task}, {'greedy' if heat == 0 else 'T = 1'}",
            *(_gain(record, task, heat, one) for one in ("ft", "twin")),
        ]
        for heat in (0.0, 1.0)
        for task in TASK_NAMES
    ]
    on = {task: [_sign(_pair(record, task, heat, "twin")) for heat in (0.0, 1.0)] for task in TASK_NAMES}
    return f"""
## What of the paper's claims holds here

**A language-only draft is good: {"holds" if min(speedups) > GOOD_MBSU else "holds in part"}.** Without ever
seeing a picture *ft* reaches a memory-bound speed-up of {min(speedups):.2f} to {max(speedups):.2f} by task and
γ. The paper has up to {PAPER_MBSU}, with 115 M parameters for LLaVA-7B.

**Tuning pays: {_tuning_verdict(set(rises.values()), len(cases))}.** Of {len(cases)} cases of task and γ, greedy
block efficiency rises from *base* to *chat* in {rises["chat", 0.0]} and from *chat* to *ft* in
{rises["ft", 0.0]}; at temperature 1, with block verification, in {rises["chat", 1.0]} and {rises["ft", 1.0]}.
Half of the answers that *ft* learned from are greedy ones, which sharpens its law: that helps greedy decoding,
and may be what it loses when sampling.

**An image adapter helps a little, on captions, and is on a par elsewhere: {_adapter_verdict(on)}.** The block
efficiency of *image* less that of *ft*, and of its text-only twin, on the same prompts (γ = {GAMMAS[-1]}, with
95 % intervals over prompts):

{table(["task", "*image* less *ft*", "*image* less *twin*"], body)}

{_adapter_words(on)}
"""


def _tuning_verdict(rises: set[int], cases: int) -> str:
    return "holds" if rises == {cases} else "holds in part"


def _pair(record: dict[str, Any], task: str, heat: float, other: str) -> dict[str, Any]:
    wanted = (task, heat, other)
    return next(one for one in record["pairs"] if (one["task"], one["temperature"], one["other"]) == wanted)


def _gain(record: dict[str, Any], task: str, heat: float, other: str) -> str:
    pair = _pair(record, task, heat, other)
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(pair["difference"], *pair["interval"])


def _sign(pair: dict[str, Any]) -> int:
    """1 or -1 where the interval leaves out zero, else 0."""
    low, high = pair["interval"]
    return (low > 0) - (high < 0)


def _adapter_verdict(on: dict[str, list[int]]) -> str:
    captions, others = on["caption"], [sign for task in TASK_NAMES[1:] for sign in on[task]]
    if max(captions) <= 0:
        return "not seen here"
    if max(others) > 0:
        return "it helps on captions, and elsewhere too"
    return "holds" if min(captions) > 0 and min(others) == 0 else "holds in part"


def _adapter_words(on: dict[str, list[int]]) -> str:
    words = {1: "gains", -1: "loses", 0: "makes no difference that these prompts can tell"}
    said = [
        f"on {task} the picture {words[greedy]}, greedy and sampled"
        if greedy == sampled
        else f"on {task} the picture {words[greedy]} when greedy, and {words[sampled]} at T = 1"
        for task, (greedy, sampled) in on.items()
    ]
    return f"Beside the twin, {'; '.join(said)}."


def rejected(record: dict[str, Any]) -> str:
    """Which tokens are rejected, by kind, with examples."""
    kinds = {draft: _kinds(record, draft) for draft in PAPER_DRAFTS}
    misses = sum(missed for missed, _ in kinds["ft"].values())
    body = []
    for kind in (*VISUAL, *OTHER):
        if kind in kinds["ft"]:
            shares = [_share(kinds[draft], [kind]) for draft in PAPER_DRAFTS]
            missed, tested = kinds["ft"][kind]
            cells = ["-" if share is None else f"{share:.0%}" for share in shares]
            body.append([kind, str(tested), *cells, f"{missed / max(1, misses):.0%}"])
    seen, rest = (_share(kinds["ft"], some) or 0.0 for some in (VISUAL, OTHER))
    eyes, others = (_share(kinds["image"], some) or 0.0 for some in (VISUAL, OTHER))
    part = sum(kinds["ft"][kind][0] for kind in VISUAL if kind in kinds["ft"]) / max(1, misses)
    verdict = "mostly visual nouns and attributes" if part > 0.5 else "not mostly visual nouns and attributes"
    examples = "\n\n".join(
        f"![The target's answer ({one['task']}), and the tokens that *{one['draft']}* did not foresee]"
        f"({example_name(one['task'])})"
        for one in record["examples"]
    )
    return f"""
## Which tokens are rejected

Of the tokens for which a drafted one was at stake (greedy, γ = {GAMMAS[-1]}, all three tasks): the share that
the draft did not foresee, by the kind of word that the token is part of. The last column says what the misses
of *ft* are made of.

{table(["kind", "tokens (*ft*)", *PAPER_DRAFTS, "of the misses of *ft*"], body)}

What is rejected is {verdict}: words that only the picture can tell (shape, colour, size, texture, place, number
and verdict) make {part:.0%} of the misses of *ft*. It misses {seen:.0%} of their tokens and {rest:.0%} of all
others; *image* misses {eyes:.0%} and {others:.0%}.

{examples}
"""


def example_name(task: str) -> str:
    """The file of a task's example."""
    return f"study-{task}.svg"


def _kinds(record: dict[str, Any], draft: str) -> dict[str, tuple[int, int]]:
    """Missed and tested tokens of a draft by kind, greedy, over all tasks."""
    total: dict[str, tuple[int, int]] = {}
    for one in record["kinds"]:
        if (one["draft"], one["temperature"]) == (draft, 0.0):
            for kind, (missed, tested) in one["kinds"].items():
                before = total.get(kind, (0, 0))
                total[kind] = (before[0] + missed, before[1] + tested)
    return total


def _share(kinds: dict[str, tuple[int, int]], some: Sequence[str]) -> float | None:
    found = [kinds[kind] for kind in some if kind in kinds]
    tested = sum(count for _, count in found)
    return sum(missed for missed, _ in found) / tested if tested else None
