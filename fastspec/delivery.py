"""From ragged commitments to what transformers promises: one column of tokens at a time, judged and streamed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fastspec.decoder import Commitment
from fastspec.state import FinishReason


class Delivery:
    """Lines the sequences of a batch up again, as plain decoding would have produced them.

    Sequences accept at different speeds; a column is delivered once every open sequence has its token, so
    streamers and stopping criteria see exactly the calls that ``generate`` would make, after every token.
    A finished sequence is padded.

    Args:
        prompt_ids: ``[B, L]`` int64 as the user passed them.
        pad_token_id: fills finished sequences.
        stopping_criteria: those judged on the host, token by token.
        streamer: gets each column.
        logits_processor: makes ``scores`` from raw logits; None unless scores are asked for.
        keep_logits: whether raw logits are kept.
    """

    def __init__(
        self,
        prompt_ids: torch.Tensor,
        pad_token_id: int,
        stopping_criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None = None,
        logits_processor: LogitsProcessorList | None = None,
        keep_logits: bool = False,
    ):
        batch = prompt_ids.shape[0]
        # Only what the user's code looks at must be on the user's device: each token sent there waits for the
        # cycles that are queued.
        self._device = prompt_ids.device
        on_device = stopping_criteria or logits_processor is not None
        self._columns = prompt_ids if on_device else prompt_ids.cpu()
        self._pad = pad_token_id
        self._criteria = stopping_criteria
        self._streamer = streamer
        self._processors = logits_processor
        self._keep_logits = keep_logits
        self._waiting: list[deque] = [deque() for _ in range(batch)]
        self._ended = [False] * batch
        self._closed = [False] * batch
        self.drafted: list[list[bool]] = [[] for _ in range(batch)]
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []

    @property
    def wants_logits(self) -> bool:
        """Whether :meth:`push` must be given the raw logits of each new token."""
        return self._keep_logits or self._processors is not None

    @property
    def sequences(self) -> torch.Tensor:
        """``[B, L + T]`` int64, prompts and answers so far."""
        return self._columns.to(self._device)

    def push(self, commitment: Commitment, logits: Sequence[torch.Tensor] | None = None) -> list[int]:
        """Takes what a cycle committed and delivers every column that is complete.

        Args:
            commitment: tokens of each sequence.
            logits: for each sequence, raw logits ``[count, V]`` of its new tokens.

        Returns:
            Sequences that a stopping criterion has ended.
        """
        for row, waiting in enumerate(self._waiting):
            for place, token in enumerate(commitment.tokens[row]):
                token_logits = None if logits is None else logits[row][place]
                waiting.append((token, place < commitment.num_drafted[row], token_logits))
            self._ended[row] = commitment.reasons[row] != FinishReason.RUNNING
        stopped = []
        self._close_exhausted()
        while not all(self._closed) and all(
            closed or waiting for closed, waiting in zip(self._closed, self._waiting, strict=True)
        ):
            stopped += self._deliver()
            self._close_exhausted()
        return stopped

    def _close_exhausted(self) -> None:
        for row, waiting in enumerate(self._waiting):
            self._closed[row] |= self._ended[row] and not waiting

    def _deliver(self) -> list[int]:
        column, logits = [], []
        for row, waiting in enumerate(self._waiting):
            if self._closed[row]:
                column.append(self._pad)
                logits.append(None)
                continue
            token, drafted, token_logits = waiting.popleft()
            column.append(token)
            logits.append(token_logits)
            self.drafted[row].append(drafted)
        if self.wants_logits:
            self._keep(logits)
        tokens = torch.tensor(column, device=self._columns.device)
        self._columns = torch.cat([self._columns, tokens[:, None]], dim=1)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        if not self._criteria:
            return []
        scores = tuple(self.scores) if self._processors is not None else None
        done = self._criteria(self._columns, scores).tolist()
        stopped = [row for row, stop in enumerate(done) if stop and not self._closed[row]]
        for row in stopped:
            self._closed[row] = True
        return stopped

    def _keep(self, logits: list[torch.Tensor | None]) -> None:
        present = next(one for one in logits if one is not None)
        raw = torch.stack([torch.zeros_like(present) if one is None else one for one in logits])
        raw = raw.float().to(self._device)
        if self._keep_logits:
            self.logits.append(raw)
        if self._processors is not None:
            self.scores.append(self._processors(self._columns, raw.clone()))
