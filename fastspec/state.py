"""Everything that a running generation keeps on the device."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch

from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.tree import DraftTree


class FinishReason(IntEnum):
    """Why a sequence ended."""

    RUNNING = 0
    EOS = 1
    LENGTH = 2
    INVALID_LOGITS = 3
    STOPPED = 4


#: Entries of a report before its tokens: how many are new, how many of those drafted, and the finish reason.
REPORT_HEADER = 3


class DecodeState:
    """Tokens, lengths, parameters and counters of B sequences, on preallocated tensors.

    Attributes:
        tokens: ``[B, capacity + D + 1]`` int64, prompt and output; image placeholders count as tokens.
        num_tokens: ``[B]`` int64, tokens committed. The last of them is the root: its key and value do not
            exist yet, so the target's cache holds ``num_tokens - 1`` rows.
        max_tokens: ``[B]`` int64, the length at which a sequence ends.
        reason: ``[B]`` int64, a :class:`FinishReason`.
        num_new: ``[B]`` int64, tokens committed by the last cycle; 0 once finished.
        num_drafted: ``[B]`` int64, how many of those were drafted.
        new_tokens: ``[B, D + 1]`` int64, those tokens; what follows them is some token.
        report: ``[B, 3 + D + 1]`` int64, for the host: count, drafted, reason and tokens of the last cycle.
        tree_tokens: ``[B, N]`` int64, the tree of this cycle, the root first, -1 where nothing was proposed.
        draft_logits: ``[B, N_inner, V]`` float32, log-weights of q (see :mod:`fastspec.ops.propose`).
        cycles: ``[B]`` int64, target passes over a tree.
        accepted: ``[B, D + 1]`` int64, how many cycles committed 0, 1, ... D drafted tokens.
        committed: ``[B]`` int64, tokens committed by cycles (the prefill's first token is not counted).
        sampling: how the target samples, seeds and seen tokens.
        draft_sampling: how the draft samples, for the same sequences.
    """

    def __init__(
        self,
        batch_size: int,
        capacity: int,
        tree: DraftTree,
        vocab_size: int,
        device: torch.device | str,
    ):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.batch_size, self.capacity, self.tree = batch_size, capacity, tree
        self.tokens = zeros(batch_size, capacity + tree.max_depth + 1)
        self.num_tokens = zeros(batch_size) + 1
        self.max_tokens = zeros(batch_size)
        self.reason = zeros(batch_size) + FinishReason.LENGTH
        self.num_new = zeros(batch_size)
        self.num_drafted = zeros(batch_size)
        self.new_tokens = zeros(batch_size, tree.max_depth + 1)
        self.report = zeros(batch_size, REPORT_HEADER + tree.max_depth + 1)
        self.tree_tokens = zeros(batch_size, tree.num_nodes) - 1
        self.draft_logits = torch.zeros(
            batch_size, len(tree.inner), vocab_size, dtype=torch.float32, device=device
        )
        self.cycles = zeros(batch_size)
        self.accepted = zeros(batch_size, tree.max_depth + 1)
        self.committed = zeros(batch_size)
        self.sampling = SamplingTensors(batch_size, vocab_size, device)
        self.draft_sampling = SamplingTensors(batch_size, vocab_size, device, self.sampling)

    def clear(self) -> None:
        """Leaves every sequence finished and empty."""
        self.num_tokens.fill_(1)
        self.reason.fill_(FinishReason.LENGTH)
        for counter in (
            self.max_tokens,
            self.num_new,
            self.num_drafted,
            self.cycles,
            self.accepted,
            self.committed,
        ):
            counter.zero_()
        self.sampling.seen.zero_()

    def admit(
        self,
        row: int,
        input_ids: torch.Tensor,
        max_tokens: int,
        params: SamplingParams,
        draft_params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int],
        padding_ids: Sequence[int] = (),
    ) -> None:
        """Starts a sequence with its prompt ``[T]``; see :class:`fastspec.decoder.Request` for the rest."""
        length = input_ids.shape[0]
        self.tokens[row, :length] = input_ids
        # fill_ where an assignment would do: that copies the number from the host, and may wait for the device.
        self.num_tokens[row].fill_(length)
        self.max_tokens[row].fill_(max_tokens)
        self.reason[row].fill_(FinishReason.RUNNING)
        self.sampling.set(row, params, seed, eos_token_ids)
        self.draft_sampling.set(row, draft_params, seed, eos_token_ids)
        seen = self.sampling.seen[row]
        vocab_size = self.sampling.vocab_size
        # Ids outside the vocabulary mark an entry that is dropped: to leave them out would wait for the device.
        inside = (input_ids >= 0) & (input_ids < vocab_size)
        marks = seen.new_zeros(vocab_size + 1).index_fill_(
            0, torch.where(inside, input_ids, vocab_size).to(seen.device), True
        )
        seen |= marks[:vocab_size]
        for token_id in padding_ids:
            seen[token_id].fill_(True)
        self.tree_tokens[row, 0] = input_ids[-1]
