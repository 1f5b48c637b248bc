"""transformers' logits processors: those the kernels know become parameters, the rest run per tree node."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from fastspec.sampling import SamplingParams
from fastspec.state import DecodeState, FinishReason
from fastspec.tree import DraftTree

#: Processors that become sampling parameters, in the one order in which the kernels apply them.
_NATIVE_ORDER = (
    RepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
#: Processors whose state assumes that tokens come one by one and are never taken back.
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


@dataclass(frozen=True)
class TranslatedProcessors:
    """What a list of processors asks for.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: as in :class:`SamplingParams`.
        min_new_tokens: tokens of the answer before an end-of-sequence token may come.
        penalises_padding: whether the repetition penalty counts left padding (transformers 5.17 does, 5.23 does not).
        foreign: processors that no parameter expresses; if there are any, the whole list runs in Python.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    penalises_padding: bool = False
    foreign: tuple[object, ...] = ()

    def params(self, prompt_tokens: int, do_sample: bool) -> SamplingParams:
        """Parameters of a sequence with a prompt of ``prompt_tokens``."""
        return SamplingParams(
            temperature=self.temperature if do_sample else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=prompt_tokens + self.min_new_tokens if self.min_new_tokens else 0,
        )


def translate(
    processors: LogitsProcessorList, prompt_length: int, starts: Sequence[int], eos_token_ids: Sequence[int]
) -> TranslatedProcessors:
    """Reads the processors that ``generate`` built.

    Args:
        processors: the prepared list.
        prompt_length: padded length of the prompts, from which transformers counts.
        starts: where each prompt begins after its padding.
        eos_token_ids: the tokens that end a sequence, which a minimum length holds back.

    Raises:
        ValueError: for a processor that no speculative decoding can honour.
    """
    found: dict[str, Any] = {}
    foreign, last = [], -1
    for processor in processors:
        if isinstance(processor, _STATEFUL):
            raise ValueError(
                f"{type(processor).__name__} cannot be honoured: it keeps state from token to token, and "
                "speculative decoding takes tokens back"
            )
        place = _NATIVE_ORDER.index(type(processor)) if type(processor) in _NATIVE_ORDER else -1
        # Repetition penalty and minimum length commute; among the others the order counts.
        if place <= last or not _is_native(processor, prompt_length, starts, eos_token_ids):
            foreign.append(processor)
            continue
        last = place
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            found["repetition_penalty"] = processor.penalty
            found["penalises_padding"] = processor.prompt_ignore_length is None
        elif isinstance(processor, MinLengthLogitsProcessor):
            found["min_new_tokens"] = max(
                found.get("min_new_tokens", 0), processor.min_length - prompt_length
            )
        elif isinstance(processor, MinNewTokensLengthLogitsProcessor):
            found["min_new_tokens"] = max(found.get("min_new_tokens", 0), processor.min_new_tokens)
        elif isinstance(processor, TemperatureLogitsWarper):
            found["temperature"] = processor.temperature
        elif isinstance(processor, TopKLogitsWarper):
            found["top_k"] = processor.top_k
        elif isinstance(processor, TopPLogitsWarper):
            found["top_p"] = processor.top_p
        elif isinstance(processor, MinPLogitsWarper):
            found["min_p"] = processor.min_p
    return TranslatedProcessors(**found, foreign=tuple(foreign))


def _is_native(
    processor: object, prompt_length: int, starts: Sequence[int], eos_token_ids: Sequence[int]
) -> bool:
    if type(processor) not in _NATIVE_ORDER:
        return False
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        return ignored is None or (isinstance(ignored, torch.Tensor) and ignored.tolist() == list(starts))
    if isinstance(processor, (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor)):
        # A user's own may hold back other tokens or count from elsewhere.
        counted_from = getattr(processor, "prompt_length_to_skip", prompt_length)
        held_back = torch.as_tensor(processor.eos_token_id).flatten().tolist()
        return counted_from == prompt_length and set(held_back) == set(eos_token_ids)
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        return False
    return getattr(processor, "filter_value", float("-inf")) == float("-inf")


class ProcessorHook:
    """Applies a whole processor list at every tree node, each with its true prefix; slower than the kernels.

    Each sequence is handed over as a batch in which it stands in its own row, so processors that index by
    batch row or read lengths see what they would see in plain decoding.

    Args:
        processors: the prepared list.
        prompt_ids: ``[B, L]`` prompts as the user passed them, padding included.
        prompt_lengths: tokens of each prompt without padding.
    """

    def __init__(self, processors: LogitsProcessorList, prompt_ids: torch.Tensor, prompt_lengths: list[int]):
        self._processors = processors
        self._prompt_ids = prompt_ids
        self._prompt_lengths = prompt_lengths
        names = ", ".join(sorted({type(processor).__name__ for processor in processors}))
        warnings.warn(
            "these logits processors run in Python at every drafted token, which is exact but slow (and on a GPU "
            f"the decoding cycle cannot be captured as a CUDA graph): {names}",
            stacklevel=2,
        )

    def __call__(self, state: DecodeState, tree: DraftTree, logits: torch.Tensor) -> torch.Tensor:
        processed = logits.float()
        batch = self._prompt_ids.shape[0]
        for row, prompt_length in enumerate(self._prompt_lengths):
            if state.reason[row] != FinishReason.RUNNING:
                continue
            answer = state.tokens[row, prompt_length : int(state.num_tokens[row])]
            prefix = torch.cat([self._prompt_ids[row].to(answer.device), answer])
            for node in range(tree.num_nodes):
                drafted = state.tree_tokens[row, list(tree.path(node)[1:])]
                if (drafted < 0).any():
                    continue
                input_ids = torch.cat([prefix, drafted]).expand(batch, -1)
                scores = processed[row, node].expand(batch, -1).clone()
                processed[row, node] = self._processors(input_ids, scores)[row]
        return processed
