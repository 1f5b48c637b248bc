"""Sampling parameters and warping: from logits to the law that is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from fastspec.tree import DraftTree


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence samples. The defaults are those of plain sampling from the model.

    The names and their order of application are those of transformers: repetition penalty, minimum length,
    temperature, top-k, top-p, min-p.

    Args:
        temperature: 0 is greedy decoding.
        top_k: keep the k most likely tokens, all those tied with the last; 0 keeps all.
        top_p: keep the most likely tokens until their mass reaches this share, ties included.
        min_p: keep the tokens at least this likely relative to the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before.
        min_tokens: total length (prompt included) below which no end-of-sequence token is produced.

    Raises:
        ValueError: for a value outside its range; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0

    def __post_init__(self):
        ranges = {
            "temperature": (
                self.temperature == 0 or _is_single(self.temperature),
                "a finite number of at least 0 in single precision",
            ),
            "top_k": (_is_count(self.top_k), "an integer of at least 0"),
            "top_p": (0 <= self.top_p <= 1, "in [0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (
                _is_single(self.repetition_penalty),
                "a positive number in single precision",
            ),
            "min_tokens": (_is_count(self.min_tokens), "an integer of at least 0"),
        }
        for name, (valid, expected) in ranges.items():
            if not valid:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")


def _is_single(value: float) -> bool:
    """Whether the kernels, which round it to single precision, see a positive finite number."""
    limits = torch.finfo(torch.float32)
    return limits.tiny <= value <= limits.max


def _is_count(value: float) -> bool:
    """Whether an int64 holds it unchanged, and it is not negative."""
    return 0 <= value < 2**63 and value == int(value)


class SamplingTensors:
    """What sampling a batch needs, on its device, rewritten in place between requests.

    Attributes:
        temperature, top_p, min_p, repetition_penalty: ``[B]`` float64.
        top_k, min_tokens: ``[B]`` int64.
        seed: ``[B]`` int64, the key of the sequence's random numbers.
        eos_token_ids: ``[B, 16]`` int64, padded with -1.
        seen: ``[B, V]`` bool, the tokens of the sequence so far.

    Args:
        sequences: shares seeds, ends and seen tokens with these tensors; only the parameters are its own.
    """

    MAX_EOS = 16

    def __init__(
        self,
        batch_size: int,
        vocab_size: int,
        device: torch.device | str,
        sequences: SamplingTensors | None = None,
    ):
        self.vocab_size = vocab_size
        self._params = [SamplingParams()] * batch_size
        for parameter in fields(SamplingParams):
            dtype = torch.int64 if isinstance(parameter.default, int) else torch.float64
            value = torch.full((batch_size,), parameter.default, dtype=dtype, device=device)
            setattr(self, parameter.name, value)
        if sequences is not None:
            self.seed, self.eos_token_ids, self.seen = sequences.seed, sequences.eos_token_ids, sequences.seen
            return
        self.seed = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.eos_token_ids = torch.full((batch_size, self.MAX_EOS), -1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(batch_size, vocab_size, dtype=torch.bool, device=device)

    def set(self, row: int, params: SamplingParams, seed: int, eos_token_ids: Sequence[int] = ()) -> None:
        """Writes the parameters, the seed and the ends of one sequence.

        Raises:
            ValueError: for more than 16 end-of-sequence ids.
        """
        # Ids outside the vocabulary never come, and would be written out of bounds.
        eos_token_ids = [token_id for token_id in eos_token_ids if 0 <= token_id < self.vocab_size]
        if len(eos_token_ids) > self.MAX_EOS:
            raise ValueError(f"at most {self.MAX_EOS} eos_token_ids are supported, got {len(eos_token_ids)}")
        self._params[row] = params
        for parameter in fields(SamplingParams):
            getattr(self, parameter.name)[row].fill_(getattr(params, parameter.name))
        self.seed[row].fill_((seed + 2**63) % 2**64 - 2**63)  # any integer, as the 64 bits of the key
        self.eos_token_ids[row].fill_(-1)
        for place, token_id in enumerate(eos_token_ids):  # a copy of them all would wait for the device
            self.eos_token_ids[row, place].fill_(token_id)

    def fill(self, params: SamplingParams) -> None:
        """Writes the same parameters for every sequence; seeds and ends stay."""
        self._params = [params] * len(self._params)
        for parameter in fields(SamplingParams):
            getattr(self, parameter.name).fill_(getattr(params, parameter.name))

    # What the host knows of all sequences lets the reference leave out work; kernels read the tensors.

    @property
    def greedy(self) -> bool:
        """Whether no sequence draws at random."""
        return all(params.temperature == 0 for params in self._params)

    @property
    def cuts(self) -> bool:
        """Whether a sequence has top-k, top-p or min-p."""
        return any(params.top_k > 0 or params.top_p < 1 or params.min_p > 0 for params in self._params)

    @property
    def penalises(self) -> bool:
        """Whether a sequence has a repetition penalty or a least length."""
        return any(params.repetition_penalty != 1 or params.min_tokens > 0 for params in self._params)

    def to(self, device: torch.device | str) -> SamplingTensors:
        """A copy on another device."""
        copy = SamplingTensors(len(self._params), self.vocab_size, device)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                getattr(copy, name).copy_(value)
        copy._params = list(self._params)
        return copy

    def penalise(
        self,
        logits: torch.Tensor,
        tree: DraftTree,
        nodes: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Repetition penalty and minimum length at tree nodes, each with its own prefix.

        Args:
            logits: ``[B, R, V]``, any floating dtype.
            tree: the draft tree.
            nodes: ``[R]`` int64, the nodes whose rows these are.
            tokens: ``[B, N]`` int64, the tokens of the tree's nodes, at least of the nodes' ancestors; -1 for
                none. The root's is not read: it is among the seen ones.
            positions: ``[B]`` int64, the position of the root's successor.

        Returns:
            ``[B, R, V]`` float64.
        """
        scores = logits.double()
        if not self.penalises:
            return scores
        tables = tree.on(logits.device)
        paths = tables.paths[nodes]
        on_path = tokens[:, paths]
        drafted = ((paths > 0) & (on_path >= 0)).int()  # the root is among the seen tokens
        hits = torch.zeros_like(scores, dtype=torch.int32).scatter_add(-1, on_path.clamp(min=0), drafted)
        seen = self.seen[:, None] | (hits > 0)
        # In single precision, as the kernels: what ties there ties here. transformers does the same on a CPU; on
        # a GPU it multiplies by the reciprocal, which may differ in the last bit.
        single = logits.to(torch.promote_types(logits.dtype, torch.float32))
        penalty = self.repetition_penalty[:, None, None].to(single.dtype)
        penalised = torch.where(single < 0, single * penalty, single / penalty).double()
        scores = torch.where(seen, penalised, scores)
        too_short = positions[:, None] + tables.depths[nodes] < self.min_tokens[:, None]
        eos = torch.zeros_like(self.seen, dtype=torch.int32)
        eos.scatter_add_(-1, self.eos_token_ids.clamp(min=0), (self.eos_token_ids >= 0).int())
        return scores.masked_fill(too_short[..., None] & (eos > 0)[:, None], float("-inf"))

    def warp(self, scores: torch.Tensor) -> torch.Tensor:
        """Temperature, top-k, top-p and min-p as transformers' processors apply them, per sequence.

        After subtracting a row's maximum, w = exp((l - max) / T) turns top-k, top-p and min-p into one
        threshold on w, so ties are kept or cut together. Temperature 0 leaves the first maximum alone.

        Args:
            scores: ``[B, R, V]`` float64; every row must be valid (:func:`valid_rows`).

        Returns:
            ``[B, R, V]`` float64 log-weights: ``softmax`` of them is the law, -inf marks tokens cut away.
        """
        first = scores.argmax(-1, keepdim=True)  # the lowest id among ties
        greedy = torch.full_like(scores, float("-inf")).scatter(-1, first, 0.0)
        if self.greedy:
            return greedy
        maximum = scores.amax(-1, keepdim=True)
        temperature = self.temperature[:, None, None]
        log_weights = (scores - maximum) / torch.where(temperature > 0, temperature, 1.0)

        # Single precision, in which the kernels work, knows no weight under 2**-126 of the largest.
        weights = log_weights.exp()
        kept = weights >= 2.0**-126
        if self.cuts:
            kept &= self._uncut(log_weights)
        warped = torch.where(kept, log_weights, float("-inf"))
        return torch.where(temperature > 0, warped, greedy)

    def _uncut(self, log_weights: torch.Tensor) -> torch.Tensor:
        """Tokens that top-k, top-p and min-p leave; ``[B, R, V]`` log-weights relative to the largest to bool."""
        vocab_size = log_weights.shape[-1]
        # Ties are those of log-weights: at a high temperature all weights round to 1.
        log_weights, order = log_weights.sort(-1, descending=True)
        top_k = self.top_k[:, None, None]
        last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
        kth = log_weights.gather(-1, last.expand(*log_weights.shape[:-1], 1))
        weights = torch.where(log_weights >= kth, log_weights.exp(), 0.0)

        # A token stays while the mass of strictly heavier ones is below top_p: equal weights share a fate.
        cumulative = weights.cumsum(-1)
        before = torch.nn.functional.pad(cumulative[..., :-1], (1, 0))
        starts_group = torch.ones_like(weights, dtype=torch.bool)
        starts_group[..., 1:] = log_weights[..., 1:] != log_weights[..., :-1]
        heavier = torch.where(starts_group, before, 0.0).cummax(-1).values
        top_p = self.top_p[:, None, None]
        # Rounding can make the sum of all lighter tokens vanish: top_p = 1 must not depend on it.
        keep = (heavier == 0) | (heavier < top_p * cumulative[..., -1:]) | (top_p >= 1)
        keep &= (weights > 0) & (weights >= self.min_p[:, None, None])
        return torch.zeros_like(keep).scatter(-1, order, keep)


def valid_rows(logits: torch.Tensor) -> torch.Tensor:
    """Rows that define a law: no NaN, no +inf, at least one finite logit. ``[..., V]`` to ``[...]`` bool."""
    return (logits < float("inf")).all(-1) & (logits > float("-inf")).any(-1)
