"""The evaluations that the study is made of. Each keeps a journal, so that a study that was killed continues."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastspec.evaluation import JOURNAL, Evaluation, Results, evaluate
from fastspec.runs import Run
from fastspec.tasks import MINIATURE

TASKS = ("miniature:caption", "miniature:conversation", "miniature:science")
TASK_NAMES = tuple(task.removeprefix(MINIATURE) for task in TASKS)
#: The drafts that the paper compares, from the plainest on.
PAPER_DRAFTS = ("base", "chat", "ft", "image")
FURTHER_TASKS = ("miniature:follow-up", "miniature:two-pictures")
GAMMAS = (3, 5)
TREE = "3,2,1"  # 16 nodes, its root included
CHAIN_RULES = ("token_level", "block")
TREE_RULES = ("recursive_rejection", "traversal")


@dataclass(frozen=True)
class Part:
    """One evaluation.

    Attributes:
        name: of its folder.
        drafts: by the names that the study gives them, what ``fastspec evaluate`` loads.
        share: prompts of each task, as a part of the study's.
    """

    name: str
    drafts: dict[str, str]
    tasks: tuple[str, ...] = TASKS
    gammas: tuple[int, ...] = ()
    trees: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (0.0, 1.0)
    share: float = 1.0


def parts(paper: dict[str, str], twin: dict[str, str], compact: dict[str, str]) -> list[Part]:
    """The study.

    Args:
        paper: the drafts that the paper compares.
        twin: the text-only draft that was trained like the image draft.
        compact: compact copies of the ft draft.
    """
    return [
        # At temperature 0 every rule is greedy decoding.
        Part("greedy", paper, gammas=GAMMAS, trees=(TREE,), temperatures=(0.0,)),
        Part("chains", paper, gammas=GAMMAS, rules=CHAIN_RULES, temperatures=(1.0,)),
        Part("trees", paper, trees=(TREE,), rules=TREE_RULES, temperatures=(1.0,)),
        Part("twin", twin, gammas=GAMMAS[-1:]),
        Part("compact", compact, gammas=GAMMAS[-1:], share=0.5),
        Part("further", paper, tasks=FURTHER_TASKS, gammas=GAMMAS[-1:], share=0.5),
    ]


def measure(part: Part, out: Path, prompts: int, max_new_tokens: int, notes: Console) -> Results:
    """Runs an evaluation of the miniature on the CPU, or what is missing of it."""
    return evaluate(
        Evaluation(
            target="miniature",
            drafts=tuple(part.drafts.values()),
            tasks=part.tasks,
            gammas=part.gammas,
            trees=part.trees,
            rules=part.rules,
            temperatures=part.temperatures,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            limit=max(1, round(part.share * prompts)),
            image_folder=None,
            seed=0,
            dtype="auto",
            device="cpu",
            out=out / part.name,
        ),
        notes,
    )


def runs_of(part: Part, out: Path) -> list[Run]:
    """Every run of an evaluation that is finished."""
    lines = (out / part.name / JOURNAL).read_text().splitlines()[1:]
    return [Run.from_json(json.loads(line)) for line in lines]
