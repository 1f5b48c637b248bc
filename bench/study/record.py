"""What a study leaves on record: the figures that its page is written from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench.study.kinds import kinds_of, pieces, tally, verdicts
from bench.study.measure import CHAIN_RULES, GAMMAS, TASKS, Part, runs_of
from fastspec import miniature
from fastspec.evaluation import Results
from fastspec.metrics import bootstrap_interval
from fastspec.runs import Run
from fastspec.tasks import MINIATURE, read_task

#: Of a row of results, by the record's names.
MEASURES = {
    "prompts": "prompts",
    "tokens": "tokens",
    "tau": "block_efficiency",
    "tau_interval": "block_efficiency_interval",
    "accepted": "acceptance_by_position",
    "cost": "cost_ratio",
    "mbsu": "mbsu",
    "rate": "tokens_per_second",
    "ratio": "speedup",
    "ratio_interval": "speedup_interval",
    "ttft": "first_token_seconds",
    "plain_ttft": "plain_first_token_seconds",
}
#: Whose drafts are compared prompt by prompt with the image draft.
PAIRED = ("ft", "twin")
#: Tasks of which one answer is shown, and the draft that it is shown with.
SHOWN, SHOWN_DRAFT = TASKS[::2], "ft"
LONGEST_SHOWN = 64


def make_record(
    header: dict[str, Any], parts: Iterable[Part], results: dict[str, Results], out: Path
) -> dict[str, Any]:
    """The record of a finished study, ready for JSON.

    Args:
        header: what the study was asked for, and how its drafts were made.
        parts: its evaluations.
        results: theirs, by the parts' names.
        out: the study's folder.
    """
    runs = {part.name: runs_of(part, out) for part in parts}
    labels = {source: label for part in parts for label, source in part.drafts.items()}
    rows, drafts = [], {}
    for part in parts:
        found = results[part.name]
        for source, facts in found.header["drafts"].items():
            drafts[labels[source]] = {name: facts[name] for name in ("type", "parameters", "bytes")}
        rows += [_row(part.name, labels, row) for row in found.rows]
    some = results[parts[0].name].header
    tokenizer = miniature.load_processor().tokenizer
    deep = [run for run in (*runs["greedy"], *runs["chains"]) if len(run.branching) == GAMMAS[-1]]
    deep = [run for run in deep if set(run.branching) == {1} and run.rule == CHAIN_RULES[-1]]
    return {
        "header": header
        | {name: some[name] for name in ("fastspec", "python", "packages", "device", "threads")}
        | {
            "target": some["target"]["weights"],
            "minutes": round(sum(map(_seconds, chain(*runs.values()))) / 60),
        },
        "drafts": drafts,
        "rows": rows,
        "pairs": _pairs(runs, labels),
        "kinds": [
            {
                "task": task,
                "temperature": heat,
                "draft": label,
                "kinds": tally(
                    (one for one in deep if (one.task, one.temperature, one.draft) == (task, heat, source)),
                    tokenizer,
                ),
            }
            for task in TASKS
            for heat in (0.0, 1.0)
            for source, label in labels.items()
            if any((one.task, one.temperature, one.draft) == (task, heat, source) for one in deep)
        ],
        "examples": [_example(deep, labels, task, tokenizer) for task in SHOWN],
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """One line for each row, so that changes can be read."""
    lines = []
    for name, value in record.items():
        if isinstance(value, list):
            inner = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in value)
            lines.append(f' "{name}": [\n  {inner}\n ]')
        else:
            lines.append(f' "{name}": {json.dumps(value, ensure_ascii=False)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _seconds(run: Run) -> float:
    return run.first_token_seconds + run.decoding_seconds


def _row(part: str, labels: dict[str, str], row: dict[str, Any]) -> dict[str, Any]:
    made = {
        "part": part,
        "task": row["task"].removeprefix(MINIATURE),
        "temperature": row["temperature"],
        "draft": None if row["draft"] is None else labels[row["draft"]],
        "shape": row["shape"],
        "rule": row["rule"],
    }
    made |= {name: _short(row[source]) for name, source in MEASURES.items()}
    if "identical" in row:
        made["identical"] = row["identical"]
    return made


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_short(one) for one in value] if isinstance(value, (list, tuple)) else value


def _pairs(runs: dict[str, list[Run]], labels: dict[str, str]) -> list[dict[str, Any]]:
    """The image draft's block efficiency less another's, on the same prompts, with its interval over prompts."""
    found = {}
    for run in (one for name in ("greedy", "chains", "twin") for one in runs[name]):
        if len(run.branching) == GAMMAS[-1] and set(run.branching) == {1} and run.rule == CHAIN_RULES[-1]:
            found[labels[run.draft], run.task, run.temperature, run.prompt] = (run.committed, run.cycles)
    pairs = []
    for other in PAIRED:
        for task in TASKS:
            for heat in (0.0, 1.0):
                prompts = [key[3] for key in found if key[:3] == ("image", task, heat)]
                samples = [
                    (*found["image", task, heat, prompt], *found[other, task, heat, prompt])
                    for prompt in prompts
                ]
                sums = torch.tensor(samples).sum(0).tolist()
                pairs.append(
                    {
                        "task": task.removeprefix(MINIATURE),
                        "temperature": heat,
                        "other": other,
                        "difference": _short(sums[0] / sums[1] - sums[2] / sums[3]),
                        "interval": _short(bootstrap_interval(samples, _difference)),
                    }
                )
    return pairs


def _difference(sums: Any) -> Any:
    return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]


def _example(runs: list[Run], labels: dict[str, str], task: str, tokenizer: Any) -> dict[str, Any]:
    """The first greedy answer of a task that is neither very long nor without a miss, and what was drafted instead."""
    chosen = next(
        run
        for run in runs
        if (run.task, run.temperature, labels[run.draft]) == (task, 0.0, SHOWN_DRAFT)
        and len(run.token_ids) <= LONGEST_SHOWN
        and False in verdicts(run)
    )
    prompt = next(one for one in read_task(task, int(chosen.prompt) + 1).prompts if one.id == chosen.prompt)
    texts = pieces(chosen, tokenizer)
    return {
        "task": task.removeprefix(MINIATURE),
        "prompt": chosen.prompt,
        "draft": SHOWN_DRAFT,
        "question": prompt.text,
        "tokens": texts,
        "foreseen": verdicts(chosen),
        "kinds": kinds_of(texts),
        "drafted": _drafted(chosen, prompt.text, tokenizer),
    }


@torch.no_grad()
def _drafted(run: Run, question: str, tokenizer: Any) -> list[str | None]:
    """For each token that was not foreseen: what the draft proposed in its place."""
    from fastspec.miniature.stream import drop_image
    from fastspec.miniature.tokens import question_text

    draft = miniature.load_draft(SHOWN_DRAFT)
    prompt = drop_image(tokenizer(question_text(question, image=True))["input_ids"])
    guesses = draft(torch.tensor([prompt + list(run.token_ids)])).logits[0].argmax(-1).tolist()
    return [
        tokenizer.decode([guesses[len(prompt) + place - 1]]) if foreseen is False else None
        for place, foreseen in enumerate(verdicts(run))
    ]
