"""What a verdict changes: the cache's rows, then tokens, lengths, stops and counters of every sequence."""

from __future__ import annotations

import torch

from fastspec.model.cache import StaticCache
from fastspec.ops.backends import choose, current, extension
from fastspec.ops.verify import Verdict
from fastspec.state import REPORT_HEADER, DecodeState, FinishReason


class Committer:
    """Commits verdicts to a state and the target's cache, without allocation or synchronisation.

    Args:
        state: changed in place by :meth:`__call__`.
        cache: the target's, whose scratch rows hold the tree's keys and values.
        backend: ``"auto"``, ``"cuda"`` or ``"reference"`` (which Triton's users get too: it moves bytes only).

    Raises:
        ValueError: for a backend that cannot run here.
    """

    def __init__(self, state: DecodeState, cache: StaticCache, backend: str = "auto"):
        self.state, self.cache = state, cache
        self.backend = choose(backend, state.tokens.device, True)

    def __call__(self, verdict: Verdict, *, first: bool = False) -> None:
        """Appends the accepted path and the next token, cut at an end-of-sequence token or the length limit.

        Finished sequences stay as they are. A sequence whose logits defined no law where its path stopped keeps
        the accepted tokens and ends as ``INVALID_LOGITS``.

        Args:
            verdict: the outcome of this cycle; the tree's root becomes the last committed token.
            first: the verdict is on the prefill's logits, which are not a cycle.
        """
        moves = not first and not self.state.tree.is_chain
        if self.backend == "cuda":
            with current(self.state.tokens.device):
                if moves:
                    self._compact_cuda(verdict)
                self._commit_cuda(verdict, first)
            return
        if moves:
            self.cache.keep_path(self.state.num_tokens - 1, verdict.path)
        commit(self.state, verdict, first=first)

    def _compact_cuda(self, verdict: Verdict) -> None:
        keys, values = self.cache.keys, self.cache.values
        layers, batch, heads, capacity, head_dim = keys.shape
        extension().compact(
            keys.data_ptr(),
            values.data_ptr(),
            self.state.num_tokens.data_ptr(),
            verdict.path.data_ptr(),
            verdict.num_accepted.data_ptr(),
            capacity,
            layers,
            batch,
            heads,
            head_dim * keys.element_size(),
            verdict.path.shape[1],
            torch.cuda.current_stream(keys.device).cuda_stream,
        )

    def _commit_cuda(self, verdict: Verdict, first: bool) -> None:
        state = self.state
        # The first verdict is on a tree of one node, and the rows of the state are those of the decoder's tree.
        path = verdict.path.expand(-1, state.new_tokens.shape[1]).contiguous() if first else verdict.path
        changed = (
            state.tokens,
            state.num_tokens,
            state.reason,
            state.num_new,
            state.num_drafted,
            state.tree_tokens,
            state.new_tokens,
            state.report,
            state.cycles,
            state.accepted,
            state.committed,
            state.sampling.seen,
        )
        extension().commit(
            path.data_ptr(),
            verdict.num_accepted.data_ptr(),
            verdict.next_token.data_ptr(),
            verdict.invalid.data_ptr(),
            state.sampling.eos_token_ids.data_ptr(),
            state.max_tokens.data_ptr(),
            *(tensor.data_ptr() for tensor in changed),
            state.tokens.stride(0),
            state.batch_size,
            state.tree_tokens.shape[1],
            path.shape[1],
            state.sampling.vocab_size,
            FinishReason.RUNNING,
            FinishReason.EOS,
            FinishReason.LENGTH,
            FinishReason.INVALID_LOGITS,
            first,
            torch.cuda.current_stream(state.tokens.device).cuda_stream,
        )


def commit(state: DecodeState, verdict: Verdict, *, first: bool = False) -> None:
    """The reference of :class:`Committer` for everything but the cache."""
    sampling = state.sampling
    running = state.reason == FinishReason.RUNNING
    steps = torch.arange(verdict.path.shape[1], device=state.tokens.device)
    drafted = state.tree_tokens.gather(1, verdict.path.roll(-1, dims=1))
    block = torch.where(steps == verdict.num_accepted[:, None], verdict.next_token[:, None], drafted)

    count = verdict.num_accepted + (~verdict.invalid).long()
    room = state.max_tokens - state.num_tokens
    is_eos = (block[..., None] == sampling.eos_token_ids[:, None]).any(-1) & (steps < count[:, None])
    before_eos = torch.where(is_eos, steps, len(steps)).amin(1)
    ends = before_eos < torch.minimum(count, room)
    out_of_room = ~ends & (count >= room)
    failed = verdict.invalid & ~ends & ~out_of_room
    count = torch.where(ends, before_eos + 1, torch.minimum(count, room))
    count = torch.where(running, count, 0)

    reason = torch.where(out_of_room, int(FinishReason.LENGTH), int(FinishReason.RUNNING))
    reason = torch.where(failed, int(FinishReason.INVALID_LOGITS), reason)
    reason = torch.where(ends, int(FinishReason.EOS), reason)
    state.reason.copy_(torch.where(running, reason, state.reason))

    # Beyond the new length anything may stand: the next cycle overwrites it.
    state.tokens.scatter_(1, state.num_tokens[:, None] + steps, block)
    committed = steps < count[:, None]
    sampling.seen |= (
        torch.zeros_like(sampling.seen, dtype=torch.int32).scatter_add_(
            1, block.clamp(min=0), committed.int()
        )
        > 0
    )
    state.num_tokens += count
    state.num_new.copy_(count)
    state.num_drafted.copy_(torch.minimum(count, verdict.num_accepted))
    state.new_tokens[:, : len(steps)] = torch.where(committed, block, 0)
    state.tree_tokens[:, 0] = state.tokens.gather(1, state.num_tokens[:, None] - 1)[:, 0]
    if not first:
        state.cycles += running
        state.committed += count
        state.accepted.scatter_add_(1, state.num_drafted[:, None], running.long()[:, None])
    state.report[:, :REPORT_HEADER] = torch.stack((count, state.num_drafted, state.reason), dim=1)
    state.report[:, REPORT_HEADER : REPORT_HEADER + len(steps)] = block
