"""Prompts decoded one at a time in many ways, on one target, and timed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.progress import Progress
from torch import nn
from transformers import BatchFeature

from fastspec.combination import PLAIN, Combination
from fastspec.command import chat_text
from fastspec.decoder import Request, SpeculativeDecoder, check_pair, resolve_tree
from fastspec.draft import make_draft
from fastspec.generation import check_leftovers, make_prompts
from fastspec.lines import BadLines, DataError
from fastspec.sampling import SamplingParams
from fastspec.tasks import Task, TaskPrompt

WARM_UP_TOKENS = 8


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


class Prepared(NamedTuple):
    """A prompt as the target's processor made it."""

    input_ids: torch.Tensor
    images: dict[str, Any]


class Decoding:
    """Decoders for all ways of decoding, on one target.

    Args:
        processor, target: the target model with its processor.
        drafts: by the name that combinations use; each with its tokenizer, if it has one.
        combinations: the ways of speculating; plain decoding is always there.
        max_new_tokens: most tokens of an answer.
        seed: changes all random numbers.

    Raises:
        TypeError, ValueError: for a target and a draft that do not go together.
    """

    def __init__(
        self,
        processor: Any,
        target: nn.Module,
        drafts: dict[str, tuple[Any, Any]],
        combinations: Sequence[Combination],
        max_new_tokens: int,
        seed: int = 0,
    ):
        self.processor, self.target, self.drafts = processor, target, drafts
        self.combinations, self.max_new_tokens, self.seed = combinations, max_new_tokens, seed
        self._decoders: dict[Combination, SpeculativeDecoder] = {}
        self._warm: set[Combination] = set()
        for draft, tokenizer in drafts.values():
            made = make_draft(draft)
            made.attach(target)
            check_pair(target, made, resolve_tree(made, 1, None), None, processor.tokenizer, tokenizer)
        end = target.generation_config.eos_token_id
        end = processor.tokenizer.eos_token_id if end is None else end
        self._eos = () if end is None else tuple(end) if isinstance(end, list) else (end,)

    def check(self, tasks: Sequence[Task], bad: BadLines, progress: Progress) -> list[Task]:
        """The tasks with the prompts that can be asked: images readable, the answer within the target's reach.

        Raises:
            DataError: for a prompt that cannot, unless bad lines are skipped.
            ValueError: for a task of which no prompt is left.
        """
        checked, self._longest = [], 0
        bar = progress.add_task("checking prompts", total=sum(len(task.prompts) for task in tasks))
        for task in tasks:
            good = []
            for prompt in task.prompts:
                try:
                    self._longest = max(self._longest, self._length(prompt))
                    good.append(prompt)
                except DataError as error:
                    bad.report(error)
                progress.advance(bar)
            if not good:
                raise ValueError(f"{task.name} has no prompt that can be asked; {bad.summary()}")
            checked.append(Task(task.name, tuple(good)))
        progress.remove_task(bar)
        return checked

    def _length(self, prompt: TaskPrompt) -> int:
        length, new = self.prepare(prompt).input_ids.shape[1], self.max_new_tokens
        limit = self.target.config.get_text_config().max_position_embeddings
        if length + new > limit:
            raise prompt.error(
                f"the prompt has {length} tokens, which with {new} new ones are more than the target's "
                f"max_position_embeddings of {limit}"
            )
        return length

    def allocate(self) -> None:
        """Makes decoders whose buffers hold the longest of the prompts that were checked."""
        capacity = self._longest + self.max_new_tokens
        self._decoders = {PLAIN: SpeculativeDecoder(self.target, None, capacity=capacity)}
        for combination in self.combinations:
            draft, tokenizer = self.drafts[combination.draft]
            self._decoders[combination] = SpeculativeDecoder(
                self.target,
                draft,
                tree=combination.tree,
                rule=combination.rule,
                capacity=capacity,
                tokenizer=self.processor.tokenizer,
                draft_tokenizer=tokenizer,
            )

    def prepare(self, prompt: TaskPrompt) -> Prepared:
        """The target's inputs for a prompt, on its device.

        Raises:
            DataError: for an image that cannot be read, or one that the processor refuses.
        """
        images = prompt.load_images()
        token = getattr(self.processor, "image_token", None)
        said = [prompt.text, *(words for turn in prompt.history for words in turn)]
        if token and any(token in words for words in said):
            raise prompt.error(f"the prompt holds the target's own image token {token!r}")
        try:
            text = chat_text(self.processor, prompt.text, len(images), prompt.history)
            inputs: BatchFeature = self.processor(images=images or None, text=text, return_tensors="pt")
        except (ValueError, TypeError) as error:
            raise prompt.error(f"the target's processor refuses the prompt: {error}") from None
        inputs = dict(inputs.to(self.target.device))
        input_ids = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)  # a single prompt has no padding
        check_leftovers(dict(inputs))
        return Prepared(input_ids, inputs)

    def run(
        self,
        task: Task,
        prompt: TaskPrompt,
        inputs: Prepared,
        params: SamplingParams,
        combination: Combination,
    ) -> Run:
        """Decodes one prompt in one way."""
        name = [task.name, prompt.id, params.temperature, *combination]
        seed = _seed(self.seed, name)
        decode = (self._decoders[combination], inputs, params, seed)
        if combination not in self._warm:
            # The first generation of a decoder also pays for lazy initialisation.
            self._decode(*decode, min(WARM_UP_TOKENS, self.max_new_tokens))
            self._warm.add(combination)
        tokens, drafted, first_seconds, seconds = self._decode(*decode, self.max_new_tokens)
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
            first_token_seconds=first_seconds,
            decoding_seconds=seconds - first_seconds,
        )

    def _decode(
        self,
        decoder: SpeculativeDecoder,
        inputs: Prepared,
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


def _seed(seed: int, name: Sequence[Any]) -> int:
    """A seed of its own for each prompt and way of decoding, the same in every process."""
    digest = hashlib.blake2b(json.dumps([seed, *name]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
