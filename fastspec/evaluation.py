"""What ``fastspec evaluate`` does: drafts on tasks, every combination beside plain decoding."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import BatchFeature

from fastspec.command import chat_text, check_dtype, load_draft, load_target
from fastspec.decoder import (
    DEFAULT_GAMMA,
    Request,
    SpeculativeDecoder,
    check_pair,
    check_target,
    resolve_rule,
    resolve_tree,
)
from fastspec.draft import make_draft
from fastspec.generation import check_leftovers, make_prompts
from fastspec.info import collect
from fastspec.journal import Journal
from fastspec.metrics import SpeculationRecord, bootstrap_interval
from fastspec.sampling import SamplingParams
from fastspec.state import FinishReason
from fastspec.tasks import Task, TaskPrompt, read_task
from fastspec.tree import DraftTree
from fastspec.verification import Rule

JOURNAL = "journal.jsonl"
WARM_UP_TOKENS = 8
#: Elements of each parameter that tell checkpoints apart: a training that went on changes nearly all.
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


class Combination(NamedTuple):
    """One way of decoding, temperature apart. Plain decoding has neither draft nor rule, and no branches.

    Attributes:
        draft: as the user named it.
        branching: children of each node by depth; a chain has one each.
        rule: the acceptance rule.
    """

    draft: str | None
    branching: tuple[int, ...]
    rule: str | None

    @property
    def tree(self) -> DraftTree:
        """The tree that each cycle proposes."""
        return DraftTree.kary(self.branching)

    @property
    def shape(self) -> str:
        """The tree in words."""
        if self.draft is None:
            return "-"
        if set(self.branching) == {1}:
            return f"chain {len(self.branching)}"
        return f"tree {','.join(map(str, self.branching))}"


PLAIN = Combination(None, (), None)


@dataclass(frozen=True)
class Run:
    """One prompt decoded in one way: a line of the journal.

    Attributes:
        seed: of its random numbers.
        num_prompt_tokens: length of the prompt, image features included.
        token_ids: the answer.
        drafted: a 1 for each token of the answer that was drafted, else a 0.
        cycles, committed, accepted, cost_ratio: as in :class:`fastspec.metrics.SpeculationRecord`.
        finish_reason: in lower case.
        first_token_seconds: from the prompt on the device to the first token: images encoded, target and
            draft prefilled.
        decoding_seconds: all that came after.
    """

    task: str
    prompt: str
    temperature: float
    draft: str | None
    branching: tuple[int, ...]
    rule: str | None
    seed: int
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    drafted: str
    cycles: int
    committed: int
    accepted: tuple[int, ...]
    cost_ratio: float
    finish_reason: str
    first_token_seconds: float
    decoding_seconds: float

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Run:
        """A run as :func:`dataclasses.asdict` and JSON left it."""
        return cls(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
        )

    @property
    def key(self) -> tuple[str, str, float, Combination]:
        """What it is the only run of."""
        return self.task, self.prompt, self.temperature, Combination(self.draft, self.branching, self.rule)


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


class _Prepared(NamedTuple):
    """A prompt as the target's processor made it."""

    input_ids: torch.Tensor
    images: dict[str, Any]


def evaluate(evaluation: Evaluation, notes: Console) -> Results:
    """Decodes every prompt in every way that the journal doesn't hold yet, and sums up.

    Args:
        evaluation: what to do.
        notes: where progress goes.

    Raises:
        TypeError, ValueError: for arguments, files or models that cannot be honoured, before any decoding.
    """
    check_dtype(evaluation.dtype)
    params = {
        temperature: SamplingParams(temperature, evaluation.top_k, evaluation.top_p)
        for temperature in _distinct("temperature", evaluation.temperatures)
    }
    combinations, left_out = combine(evaluation)
    tasks = [
        read_task(name, evaluation.limit, evaluation.image_folder)
        for name in _distinct("task", evaluation.tasks)
    ]
    if evaluation.target == "miniature" and evaluation.device == "cpu":
        torch.set_num_threads(1)  # its matrices are so small that threads only wait for each other
    models = _load_models(evaluation)
    decoding = Decoding(evaluation, combinations, *models)
    head = _journal_header(evaluation, tasks, decoding)
    with Journal(evaluation.out / JOURNAL, head) as journal, _progress(notes) as progress:
        runs = {run.key: run for run in map(Run.from_json, journal.records)}
        if runs:
            notes.print(f"{len(runs)} runs are in {journal.path} already", soft_wrap=True)
        decoding.allocate(tasks, progress)
        for task in tasks:
            ways = list(product(params, (PLAIN, *combinations)))
            bar = progress.add_task(task.name, total=len(task.prompts) * len(ways))
            for prompt in task.prompts:
                # All ways of decoding a prompt follow one another, so that a machine that becomes slower
                # or faster in the course of an evaluation does so for all of them.
                keys = {way: (task.name, prompt.id, *way) for way in ways}
                missing = [way for way in ways if keys[way] not in runs]
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
    return Results(_header(evaluation, tasks, decoding, left_out), rows)


def combine(evaluation: Evaluation) -> tuple[list[Combination], list[str]]:
    """All ways of speculating, and why some drafts, shapes and rules were not put together.

    Raises:
        ValueError: for a bad shape or rule, or one that goes with nothing else that was asked for.
    """
    shapes = [DraftTree.chain(gamma) for gamma in evaluation.gammas] + list(map(_tree, evaluation.trees))
    shapes = _distinct("shape of the draft", shapes) or [DraftTree.chain(DEFAULT_GAMMA)]
    names = [rule.value for rule in Rule]
    for rule in evaluation.rules:
        if rule not in names:
            raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(map(repr, names))}")
    rules = _distinct("rule", evaluation.rules) or [None]
    drafts = _distinct("draft", evaluation.drafts)
    if not drafts:
        raise ValueError("expected at least one draft, got none")

    combinations, refused = [], {}
    for draft, tree, rule in product(drafts, shapes, rules):
        # Whatever else is loaded proposes any tree and knows its law.
        known = make_draft("ngram") if draft == "ngram" else None
        try:
            if known is not None:
                resolve_tree(known, None, tree)
            resolved = resolve_rule(known, tree, rule)
        except ValueError as error:
            refused[draft, tree, rule] = str(error)
        else:
            combinations.append((draft, tree, rule, resolved))
    for place, options in enumerate((drafts, shapes, rules)):
        for option in options:
            if not any(one[place] == option for one in combinations):
                raise ValueError(next(reason for key, reason in refused.items() if key[place] == option))
    made = [Combination(draft, _branching(tree), rule.value) for draft, tree, _, rule in combinations]
    left_out = [
        f"{Combination(draft, _branching(tree), None).shape} of {draft}: {reason}"
        for (draft, tree, _), reason in refused.items()
    ]
    return made, left_out


class Decoding:
    """Decoders for all ways of decoding, on one target.

    Args:
        evaluation: what to do.
        combinations: the ways of speculating.
        processor, target, drafts: the models; a draft comes with its tokenizer, if it has one.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        combinations: Sequence[Combination],
        processor: Any,
        target: nn.Module,
        drafts: dict[str, tuple[Any, Any]],
    ):
        self.processor, self.target, self.drafts = processor, target, drafts
        self._evaluation, self._combinations = evaluation, combinations
        self._decoders: dict[Combination, SpeculativeDecoder] = {}
        self._warm: set[Combination] = set()
        for draft, tokenizer in drafts.values():
            made = make_draft(draft)
            check_pair(target, made, resolve_tree(made, 1, None), None, processor.tokenizer, tokenizer)
        end = target.generation_config.eos_token_id
        end = processor.tokenizer.eos_token_id if end is None else end
        self._eos = () if end is None else tuple(end) if isinstance(end, list) else (end,)

    def allocate(self, tasks: Sequence[Task], progress: Progress) -> None:
        """Makes decoders whose buffers hold the longest prompt; thereby every prompt and image is checked.

        Raises:
            ValueError: for an image that cannot be read or a prompt that is too long; the message says which.
        """
        new, limit = (
            self._evaluation.max_new_tokens,
            self.target.config.get_text_config().max_position_embeddings,
        )
        longest = 0
        bar = progress.add_task("checking prompts", total=sum(len(task.prompts) for task in tasks))
        for task in tasks:
            for prompt in task.prompts:
                length = self.prepare(prompt).input_ids.shape[1]
                if length + new > limit:
                    raise ValueError(
                        f"{prompt.where}: the prompt has {length} tokens, which with {new} new ones are more "
                        f"than the target's max_position_embeddings of {limit}"
                    )
                longest = max(longest, length)
                progress.advance(bar)
        progress.remove_task(bar)
        self._decoders = {PLAIN: SpeculativeDecoder(self.target, None, capacity=longest + new)}
        for combination in self._combinations:
            draft, tokenizer = self.drafts[combination.draft]
            self._decoders[combination] = SpeculativeDecoder(
                self.target,
                draft,
                tree=combination.tree,
                rule=combination.rule,
                capacity=longest + new,
                tokenizer=self.processor.tokenizer,
                draft_tokenizer=tokenizer,
            )

    def prepare(self, prompt: TaskPrompt) -> _Prepared:
        """The target's inputs for a prompt, on its device.

        Raises:
            ValueError: for an image that cannot be read, or one that the processor refuses.
        """
        images = prompt.load_images()
        token = getattr(self.processor, "image_token", None)
        if token and token in prompt.text:
            raise ValueError(f"{prompt.where}: the prompt holds the target's own image token {token!r}")
        try:
            text = chat_text(self.processor, prompt.text, len(images))
            inputs: BatchFeature = self.processor(images=images or None, text=text, return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{prompt.where}: the target's processor refuses the prompt: {error}") from None
        inputs = dict(inputs.to(self._evaluation.device))
        input_ids = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)  # a single prompt has no padding
        check_leftovers(dict(inputs))
        return _Prepared(input_ids, inputs)

    def run(
        self,
        task: Task,
        prompt: TaskPrompt,
        inputs: _Prepared,
        params: SamplingParams,
        combination: Combination,
    ) -> Run:
        """Decodes one prompt in one way."""
        name = [task.name, prompt.id, params.temperature, *combination]
        seed = _seed(self._evaluation.seed, name)
        decode = (self._decoders[combination], inputs, params, seed)
        if combination not in self._warm:
            # The first generation of a decoder also pays for lazy initialisation.
            self._decode(*decode, min(WARM_UP_TOKENS, self._evaluation.max_new_tokens))
            self._warm.add(combination)
        tokens, drafted, first, total = self._decode(*decode, self._evaluation.max_new_tokens)
        record = self._decoders[combination].record(1)
        return Run(
            *name,
            seed=seed,
            num_prompt_tokens=inputs.input_ids.shape[1],
            token_ids=tuple(tokens),
            drafted=drafted,
            cycles=record.cycles[0],
            committed=record.committed[0],
            accepted=record.accepted[0],
            cost_ratio=record.cost_ratio,
            finish_reason=record.finish_reasons[0].name.lower(),
            first_token_seconds=first,
            decoding_seconds=total - first,
        )

    def _decode(
        self,
        decoder: SpeculativeDecoder,
        inputs: _Prepared,
        params: SamplingParams,
        seed: int,
        max_new_tokens: int,
    ) -> tuple[list[int], str, float, float]:
        """Tokens, which of them were drafted, seconds to the first token and to the last."""
        tokens, drafted, first = [], "", 0.0
        start = time.perf_counter()
        prompt = make_prompts(self.target, inputs.input_ids, [0], {}, images=inputs.images)[0]
        request = Request(prompt, max_new_tokens, params, seed=seed, eos_token_ids=self._eos)
        # Reading a commitment waits for the device, so the clock is right without synchronising.
        for commitment in decoder.stream([request]):
            first = first or time.perf_counter() - start
            count = commitment.num_drafted[0]
            drafted += "1" * count + "0" * (len(commitment.tokens[0]) - count)
            tokens += commitment.tokens[0]
        return tokens, drafted, first, time.perf_counter() - start


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


def _load_models(evaluation: Evaluation) -> tuple[Any, nn.Module, dict[str, tuple[Any, Any]]]:
    asked = [
        _Models(evaluation.target, draft, evaluation.dtype, evaluation.device) for draft in evaluation.drafts
    ]
    processor, target = load_target(asked[0])
    check_target(target)
    return processor, target, {models.draft: load_draft(models) for models in asked}


def _tree(text: str) -> DraftTree:
    factors = text.split(",")
    if not all(factor.strip().isdecimal() for factor in factors):
        raise ValueError(f"tree must be branching factors by depth, such as 3,2,1, got {text!r}")
    return DraftTree.kary(tuple(map(int, factors)))


def _branching(tree: DraftTree) -> tuple[int, ...]:
    """Children of the nodes of each level; the trees here are k-ary."""
    return tuple(len(tree.children[level[0]]) for level in tree.levels)


def _distinct(name: str, values: Sequence[Hashable]) -> list:
    for value, times in Counter(values).items():
        if times > 1:
            shown = Combination("", _branching(value), None).shape if isinstance(value, DraftTree) else value
            raise ValueError(f"{name} {shown!r} was given {times} times")
    return list(values)


def _seed(seed: int, name: Sequence[Any]) -> int:
    """A seed of its own for each prompt and way of decoding, the same in every process."""
    digest = hashlib.blake2b(json.dumps([seed, *name]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _journal_header(evaluation: Evaluation, tasks: Sequence[Task], decoding: Decoding) -> dict[str, Any]:
    """What all runs of a journal must share for their figures to belong together."""
    facts = collect()
    arguments = _arguments(evaluation)
    return {
        **{name: value for name, value in arguments.items() if name != "out"},
        "task contents": {task.name: task.digest for task in tasks},
        "target weights": fingerprint(decoding.target),
        "draft weights": {name: fingerprint(draft) for name, (draft, _) in decoding.drafts.items()},
        "machine": device_name(evaluation.device),
        "version of fastspec": facts["fastspec"],
        "version of torch": facts["packages"]["torch"],
        "version of transformers": facts["packages"]["transformers"],
    }


def _header(
    evaluation: Evaluation, tasks: Sequence[Task], decoding: Decoding, left_out: list[str]
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
    }


def _arguments(evaluation: Evaluation) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(evaluation).items()
    }


def _describe(model: Any) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        return {"type": str(model)}
    return {
        "type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": fingerprint(model),
    }


def fingerprint(model: Any) -> str:
    """Tells checkpoints apart, cheaply: a hash over a sample of every parameter."""
    if not isinstance(model, nn.Module):
        return str(model)
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)][: FINGERPRINT_SAMPLES + 1]
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
