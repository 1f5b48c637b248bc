"""What ``fastspec evaluate`` does: drafts on tasks, every combination beside plain decoding."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from fastspec.combination import PLAIN, combine, distinct
from fastspec.command import check_dtype, load_draft, load_target
from fastspec.info import collect
from fastspec.journal import Journal
from fastspec.lines import BadLines
from fastspec.runs import Decoding, Run
from fastspec.sampling import SamplingParams
from fastspec.summary import summarise
from fastspec.tasks import Task, read_task

JOURNAL = "journal.jsonl"
#: Elements of each tensor that tell checkpoints apart: a training that went on changes nearly all.
FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class Evaluation:
    """Everything the command line asks for; names as in :func:`fastspec.generate`, plural where all are tried.

    Attributes:
        trees: branching factors of k-ary trees, such as ``"3,2,1"``.
        rules: acceptance rules; none means the default of each draft and shape.
        limit: most prompts of each task.
        image_folder: where relative image paths start from, if not at the task file.
        out: folder of the journal and the results.
        skip_bad_lines: counts task lines that cannot be asked instead of ending.
    """

    target: str
    drafts: tuple[str, ...]
    tasks: tuple[str, ...]
    gammas: tuple[int, ...]
    trees: tuple[str, ...]
    rules: tuple[str, ...]
    temperatures: tuple[float, ...]
    top_k: int
    top_p: float
    max_new_tokens: int
    limit: int | None
    image_folder: Path | None
    seed: int
    dtype: str
    device: str
    out: Path
    skip_bad_lines: bool = False


@dataclass(frozen=True)
class Results:
    """What an evaluation found.

    Attributes:
        header: versions, device, models and arguments.
        rows: a dictionary for each combination of task, temperature and way of decoding.
    """

    header: dict[str, Any]
    rows: list[dict[str, Any]]


class _Models(NamedTuple):
    """What :mod:`fastspec.command` loads, for one draft."""

    target: str
    draft: str
    dtype: str
    device: str


def evaluate(evaluation: Evaluation, notes: Console) -> Results:
    """Decodes every prompt in every way that the journal does not hold yet, and sums up.

    Args:
        evaluation: what to do.
        notes: where progress goes.

    Raises:
        TypeError, ValueError: for arguments, files or models that cannot be honoured, before any decoding.
    """
    check_dtype(evaluation.dtype)
    params = {
        temperature: SamplingParams(temperature, evaluation.top_k, evaluation.top_p)
        for temperature in distinct("temperature", evaluation.temperatures)
    }
    combinations, left_out = combine(evaluation.drafts, evaluation.gammas, evaluation.trees, evaluation.rules)
    bad = BadLines(evaluation.skip_bad_lines)
    tasks = [
        read_task(name, evaluation.limit, evaluation.image_folder, bad)
        for name in distinct("task", evaluation.tasks)
    ]
    if evaluation.target == "miniature" and evaluation.device == "cpu":
        torch.set_num_threads(1)  # its matrices are so small that threads only wait for each other
    decoding = Decoding(
        *_load_models(evaluation), combinations, evaluation.max_new_tokens, seed=evaluation.seed
    )
    with _progress(notes) as progress:
        tasks = decoding.check(tasks, bad, progress)
    if bad:
        notes.print(bad.summary(), soft_wrap=True, markup=False)
    head = _journal_header(evaluation, tasks, decoding)
    with Journal(evaluation.out / JOURNAL, head) as journal, _progress(notes) as progress:
        runs = {run.key: run for run in map(Run.from_json, journal.records)}
        if runs:
            notes.print(f"{len(runs)} runs are in {journal.path} already", soft_wrap=True, markup=False)
        decoding.allocate()
        for task in tasks:
            ways = list(product(params, (PLAIN, *combinations)))
            bar = progress.add_task(task.name, total=len(task.prompts) * len(ways))
            for prompt in task.prompts:
                # All ways of decoding a prompt follow one another, so that a machine that becomes slower
                # or faster in the course of an evaluation does so for all of them.
                missing = [way for way in ways if (task.name, prompt.id, *way) not in runs]
                progress.advance(bar, len(ways) - len(missing))
                if not missing:
                    continue
                inputs = decoding.prepare(prompt)
                for temperature, combination in missing:
                    run = decoding.run(task, prompt, inputs, params[temperature], combination)
                    journal.append(asdict(run))
                    runs[run.key] = run
                    progress.advance(bar)
    rows = [
        summarise(task, temperature, combination, runs)
        for task, temperature, combination in product(tasks, params, (PLAIN, *combinations))
    ]
    return Results(_header(evaluation, tasks, decoding, left_out, bad), rows)


def _load_models(evaluation: Evaluation) -> tuple[Any, nn.Module, dict[str, tuple[Any, Any]]]:
    asked = [
        _Models(evaluation.target, draft, evaluation.dtype, evaluation.device) for draft in evaluation.drafts
    ]
    processor, target = load_target(asked[0])
    return processor, target, {models.draft: load_draft(models) for models in asked}


def _journal_header(evaluation: Evaluation, tasks: Sequence[Task], decoding: Decoding) -> dict[str, Any]:
    """What all runs of a journal must share for their figures to belong together."""
    facts = collect()
    arguments = _arguments(evaluation)
    return {
        # Which lines were skipped, the contents tell.
        **{name: value for name, value in arguments.items() if name not in ("out", "skip_bad_lines")},
        "task contents": {task.name: task.digest for task in tasks},
        "target weights": fingerprint(decoding.target),
        "draft weights": {name: fingerprint(draft) for name, (draft, _) in decoding.drafts.items()},
        "machine": device_name(evaluation.device),
        "version of fastspec": facts["fastspec"],
        "version of torch": facts["packages"]["torch"],
        "version of transformers": facts["packages"]["transformers"],
    }


def _header(
    evaluation: Evaluation, tasks: Sequence[Task], decoding: Decoding, left_out: list[str], bad: BadLines
) -> dict[str, Any]:
    facts = collect()
    return {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastspec": facts["fastspec"],
        "python": facts["python"],
        "packages": facts["packages"],
        "cuda": facts["cuda"],
        "device": device_name(evaluation.device),
        "threads": torch.get_num_threads(),
        "backends": [backend["name"] for backend in facts["backends"] if backend["available"]],
        "target": _describe(decoding.target),
        "drafts": {name: _describe(draft) for name, (draft, _) in decoding.drafts.items()},
        "prompts": {task.name: len(task.prompts) for task in tasks},
        "arguments": _arguments(evaluation),
        "left_out": left_out,
        "skipped_lines": list(bad.messages.values()),
    }


def _arguments(evaluation: Evaluation) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(evaluation).items()
    }


def _describe(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {"type": str(model)}
    # Of a compact draft not all weights are parameters; tied ones count once.
    weights = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    return {
        "type": model.config.model_type,
        "parameters": sum(tensor.numel() for tensor in weights),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": fingerprint(model),
    }


def fingerprint(model: Any) -> str:
    """Tells checkpoints apart, cheaply: a hash over a sample of every tensor."""
    if not isinstance(model, nn.Module):
        return str(model)
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        flat = tensor.flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)][: FINGERPRINT_SAMPLES + 1]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def device_name(device: str) -> str:
    """What a device is sold as."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _progress(notes: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
    )
