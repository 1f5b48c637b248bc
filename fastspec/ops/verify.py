"""From the target's logits of all tree nodes to the accepted path and the next token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastspec.philox import Stream, accept_uniforms, exponentials, race
from fastspec.sampling import SamplingTensors, valid_rows
from fastspec.tree import DraftTree
from fastspec.verification import Rule, matching, recursive_rejection, traversal, walk_down, walk_up


class Verdict(NamedTuple):
    """What verification decides for each sequence.

    Attributes:
        path: ``[B, D + 1]`` int64, the nodes from the root to where the path stops, padded with that node.
        num_accepted: ``[B]`` int64, drafted tokens on the path.
        next_token: ``[B]`` int64, the token after the path; -1 where ``invalid``.
        invalid: ``[B]`` bool, the path stopped at a node whose logits define no law.
    """

    path: torch.Tensor
    num_accepted: torch.Tensor
    next_token: torch.Tensor
    invalid: torch.Tensor


def verify(
    target_logits: torch.Tensor,
    tokens: torch.Tensor,
    tree: DraftTree,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
    draft_logits: torch.Tensor | None = None,
) -> Verdict:
    """Accepts a path of the draft tree so that the emitted tokens have exactly the target's law.

    Args:
        target_logits: ``[B, N, V]`` raw logits of the tree's nodes, any floating dtype.
        tokens: ``[B, N]`` int64, the drafted tokens, -1 where there is none; the root's is not read.
        tree: the draft tree.
        sampling: parameters and seeds of the B sequences.
        positions: ``[B]`` int64, the position of the root's successor.
        rule: the acceptance rule.
        draft_logits: ``[B, N_inner, V]`` with softmax q, as :func:`fastspec.ops.propose.propose` writes them.

    Returns:
        A :class:`Verdict`. Rows of the logits off the path never matter.
    """
    tables = tree.on(target_logits.device)
    node_ids = torch.arange(tree.num_nodes, device=target_logits.device)
    scores = sampling.penalise(target_logits, tree, node_ids, tokens, positions)
    valid = valid_rows(scores)
    scores = torch.where(valid[..., None], scores, 0.0)
    p = torch.where(valid[..., None], sampling.warp(scores).softmax(-1), 0.0)
    vocab_size = p.shape[-1]

    if rule.needs_draft_law and tree.num_nodes > 1:
        q = draft_logits.double().softmax(-1)
        if rule.bottom_up:
            h, emission = traversal(tree, tokens, p, q, valid)
        else:
            h, emission = recursive_rejection(tree, tokens, p, q)
        accepted = accept_uniforms(sampling.seed, positions, node_ids) <= h
        stop = walk_up(tree, accepted) if rule.bottom_up else walk_down(tree, accepted)
        noise = exponentials(sampling.seed, positions[:, None], Stream.EMIT, stop[:, None], vocab_size)[:, 0]
        law = emission.gather(1, stop[:, None, None].expand(-1, 1, vocab_size))[:, 0]
        next_token = race(law, noise).argmax(-1)
    else:
        coupled = rule is Rule.DRAFTER_INVARIANT
        noise = exponentials(
            sampling.seed,
            positions[:, None] + (tables.depths if coupled else torch.zeros_like(tables.depths)),
            Stream.COUPLED if coupled else Stream.TARGET,
            torch.zeros_like(node_ids) if coupled else node_ids,
            vocab_size,
        )
        samples = torch.where(valid, race(p, noise).argmax(-1), -1)
        stop = matching(tree, tokens, samples)
        next_token = samples.gather(1, stop[:, None])[:, 0]

    invalid = ~valid.gather(1, stop[:, None])[:, 0]
    return Verdict(
        path=tables.paths[stop],
        num_accepted=tables.depths[stop],
        next_token=torch.where(invalid, -1, next_token),
        invalid=invalid,
    )
