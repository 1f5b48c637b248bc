"""The draft's own sampling: children for each inner node of a level, and the law they were drawn from."""

from __future__ import annotations

import torch

from fastspec.philox import Stream, exponentials, race
from fastspec.sampling import SamplingTensors, valid_rows
from fastspec.tree import DraftTree
from fastspec.verification import Rule


def propose(
    logits: torch.Tensor,
    level: int,
    tree: DraftTree,
    tokens: torch.Tensor,
    draft_logits: torch.Tensor,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
) -> None:
    """Draws the children of the inner nodes of one level.

    Children come in draw order: by Gumbel top-k without replacement under the ratio rules, by noise shared
    with the target under the drafter-invariant rule, and the most likely ones where sampling would not help
    (temperature 0, target-only). A child that the law cannot supply (support exhausted) is -1.

    Args:
        logits: ``[B, R, V_draft]`` raw draft logits of the level's inner nodes; ids from V_draft on have q = 0.
        level: depth of those nodes.
        tree: the draft tree.
        tokens: ``[B, N]`` int64, tree tokens; the level's children are written.
        draft_logits: ``[B, N_inner, V]`` floating, the rows of the level are written: warped log-weights
            whose softmax is q, the law sampled from.
        sampling: parameters and seeds.
        positions: ``[B]`` int64, the position of the root's successor.
        rule: the acceptance rule the tokens are meant for.

    A row that defines no law (NaN, +inf, nothing finite) counts as uniform: the draft's law is free.
    """
    nodes = tree.levels[level]
    device = logits.device
    node_ids = tree.on(device).inner[[tree.inner_index[node] for node in nodes]]
    vocab_size = draft_logits.shape[-1]
    logits = torch.nn.functional.pad(
        logits[..., :vocab_size].double(), (0, max(0, vocab_size - logits.shape[-1])), value=float("-inf")
    )
    scores = sampling.penalise(logits, tree, node_ids, tokens, positions)
    scores = torch.where(valid_rows(scores)[..., None], scores, 0.0)
    log_weights = sampling.warp(scores).to(draft_logits.dtype)
    rows = slice(tree.inner_index[nodes[0]], tree.inner_index[nodes[-1]] + 1)
    draft_logits[:, rows] = log_weights

    if rule is Rule.TARGET_ONLY:
        ranking = scores
    else:
        coupled = rule is Rule.DRAFTER_INVARIANT
        noise = exponentials(
            sampling.seed,
            (positions + level if coupled else positions)[:, None].expand(-1, len(nodes)),
            Stream.COUPLED if coupled else Stream.DRAFT,
            torch.zeros_like(node_ids) if coupled else node_ids,
            vocab_size,
        )
        drawn = race(log_weights.double().softmax(-1), noise)
        drawn = torch.where(drawn > 0, drawn, float("-inf"))
        ranking = torch.where(sampling.temperature[:, None, None] > 0, drawn, scores)

    width = min(max(len(tree.children[node]) for node in nodes), vocab_size)
    best, ids = ranking.sort(dim=-1, descending=True, stable=True)
    ids = torch.where(best[..., :width] > float("-inf"), ids[..., :width], -1)
    for row, node in enumerate(nodes):
        for rank, child in enumerate(tree.children[node]):
            tokens[:, child] = ids[:, row, rank] if rank < width else -1
