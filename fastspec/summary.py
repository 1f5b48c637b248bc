"""From runs to figures: rates over all prompts of a task, beside plain decoding."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastspec.combination import PLAIN, Combination
from fastspec.metrics import SpeculationRecord, bootstrap_interval
from fastspec.runs import Run
from fastspec.state import FinishReason
from fastspec.tasks import Task


def summarise(
    task: Task,
    temperature: float,
    combination: Combination,
    runs: dict[tuple[str, str, float, Combination], Run],
) -> dict[str, Any]:
    """A row of the results, ready for JSON: rates over all prompts of a task, beside plain decoding.

    Intervals are 95 % bootstrap intervals over prompts. Rates of tokens count what came after the first token
    of each answer; its time is reported apart.
    """
    ours, plain = (
        [runs[task.name, prompt.id, temperature, way] for prompt in task.prompts]
        for way in (combination, PLAIN)
    )
    tree = combination.tree
    record = SpeculationRecord(
        num_nodes=tree.num_nodes,
        draft_passes=tree.max_depth,
        cycles=tuple(run.cycles for run in ours),
        committed=tuple(run.committed for run in ours),
        accepted=tuple(run.accepted for run in ours),
        finish_reasons=tuple(FinishReason[run.finish_reason.upper()] for run in ours),
        cost_ratio=ours[0].cost_ratio,
    )
    passes = [(run.committed, run.cycles) for run in ours]
    times = [
        (one.committed, one.decoding_seconds, other.committed, other.decoding_seconds)
        for one, other in zip(ours, plain, strict=True)
    ]
    committed, seconds, plain_committed, plain_seconds = map(sum, zip(*times, strict=True))
    rate, plain_rate = _ratio(committed, seconds), _ratio(plain_committed, plain_seconds)
    row = {
        "task": task.name,
        "temperature": temperature,
        "draft": combination.draft,
        "shape": combination.shape,
        "branching": combination.branching,
        "rule": combination.rule,
        "prompts": len(ours),
        "tokens": sum(len(run.token_ids) for run in ours),
        "target_passes": record.target_passes,
        "block_efficiency": _finite(record.block_efficiency),
        "block_efficiency_interval": bootstrap_interval(passes, lambda sums: sums[..., 0] / sums[..., 1]),
        "acceptance_by_position": record.acceptance_by_position,
        "cost_ratio": record.cost_ratio,
        "mbsu": _finite(record.mbsu),
        "tokens_per_second": rate,
        "plain_tokens_per_second": plain_rate,
        "speedup": _ratio(rate, plain_rate),
        "speedup_interval": bootstrap_interval(
            times, lambda sums: sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])
        ),
        "speedup_with_first_token": _ratio(_overall_rate(ours), _overall_rate(plain)),
        "first_token_seconds": statistics.median(run.first_token_seconds for run in ours),
        "plain_first_token_seconds": statistics.median(run.first_token_seconds for run in plain),
        "finish_reasons": dict(Counter(run.finish_reason for run in ours)),
    }
    if temperature == 0:
        pairs = zip(ours, plain, strict=True)
        row["differing"] = [one.prompt for one, other in pairs if one.token_ids != other.token_ids]
        row["identical"] = not row["differing"]
    return row


def _overall_rate(runs: Sequence[Run]) -> float | None:
    """Tokens per second with the time to the first token in it."""
    seconds = sum(run.first_token_seconds + run.decoding_seconds for run in runs)
    return _ratio(sum(len(run.token_ids) for run in runs), seconds)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
