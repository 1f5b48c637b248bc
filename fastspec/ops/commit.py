"""What a verdict changes: tokens, lengths, stops and counters of every sequence."""

from __future__ import annotations

import torch

from fastspec.ops.verify import Verdict
from fastspec.state import DecodeState, FinishReason


def commit(state: DecodeState, verdict: Verdict, *, first: bool = False) -> None:
    """Appends the accepted path and the next token, cut at an end-of-sequence token or the length limit.

    Finished sequences stay as they are. A sequence whose logits defined no law where its path stopped keeps
    the accepted tokens and ends as ``INVALID_LOGITS``.

    Args:
        state: changed in place; the tree's root becomes the last committed token.
        verdict: the outcome of this cycle.
        first: the verdict is on the prefill's logits, which are not a cycle.
    """
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
    sampling.seen |= (
        torch.zeros_like(sampling.seen, dtype=torch.int32).scatter_add_(
            1, block.clamp(min=0), (steps < count[:, None]).int()
        )
        > 0
    )
    state.num_tokens += count
    state.num_new.copy_(count)
    state.num_drafted.copy_(torch.minimum(count, verdict.num_accepted))
    state.tree_tokens[:, 0] = state.tokens.gather(1, state.num_tokens[:, None] - 1)[:, 0]
    if not first:
        state.cycles += running
        state.committed += count
        state.accepted.scatter_add_(1, state.num_drafted[:, None], running.long()[:, None])
