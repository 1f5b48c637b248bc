"""Exact joint laws by enumeration: every draft outcome times every accept branch times every emission.

The target is a table of conditional laws, one per prefix, so that each tree node has its own p. Emitted blocks
shorter than the horizon are continued by the target itself; the rule is lossless iff the joint law over the
horizon equals the target's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from fastspec.tree import DraftTree
from fastspec.verification import Rule, matching, recursive_rejection, traversal, walk_down, walk_up

Prefix = tuple[int, ...]


def random_laws(
    vocab_size: int, depth: int, generator: torch.Generator, kind: str
) -> dict[Prefix, torch.Tensor]:
    """A law for every prefix of up to ``depth`` tokens. ``kind``: dense, zeros, onehot, flat."""
    laws = {}
    for length in range(depth + 1):
        for prefix in itertools.product(range(vocab_size), repeat=length):
            law = torch.rand(vocab_size, generator=generator, dtype=torch.float64) ** 3 + 1e-3
            if kind == "zeros":
                law[torch.randint(vocab_size, (), generator=generator)] = 0.0
            elif kind == "onehot":
                law = torch.nn.functional.one_hot(law.argmax(), vocab_size).double()
            elif kind == "flat":
                law = torch.ones(vocab_size, dtype=torch.float64)
            laws[prefix] = law / law.sum()
    return laws


def draws_without_replacement(q: torch.Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    """All ordered draws of ``count`` tokens with their probabilities; -1 once the support is exhausted."""
    if count == 0:
        return [((), 1.0)]
    if q.sum() <= 0:
        return [((-1,) * count, 1.0)]
    outcomes = []
    for token in range(len(q)):
        if q[token] > 0:
            rest = q.clone()
            rest[token] = 0.0
            for others, probability in draws_without_replacement(rest, count - 1):
                outcomes.append(((token, *others), float(q[token] / q.sum()) * probability))
    return outcomes


def draws_with_replacement(q: torch.Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    """All ordered independent draws; duplicates occur."""
    return [
        (tokens, float(torch.prod(q[list(tokens)])))
        for tokens in itertools.product(range(len(q)), repeat=count)
        if all(q[token] > 0 for token in tokens)
    ]


def top_children(q: torch.Tensor, count: int) -> list[tuple[tuple[int, ...], float]]:
    """The deterministic draft: the most likely tokens, lowest id first among ties."""
    return [(tuple(q.sort(descending=True, stable=True).indices[:count].tolist()), 1.0)]


Draws = Callable[[torch.Tensor, int], list[tuple[tuple[int, ...], float]]]


def draft_outcomes(tree: DraftTree, q: dict[Prefix, torch.Tensor], draws: Draws):
    """All assignments of tokens to the tree's nodes: ``(tokens, prefixes, probability)``."""
    outcomes = [((-2,), {0: ()}, 1.0)]
    for node in tree.inner:
        grown = []
        for tokens, prefixes, probability in outcomes:
            prefix = prefixes[node]
            if prefix is None:
                options = [((-1,) * len(tree.children[node]), 1.0)]
            else:
                options = draws(q[prefix], len(tree.children[node]))
            for children, weight in options:
                known = dict(prefixes)
                for child, token in zip(tree.children[node], children, strict=True):
                    known[child] = None if token < 0 or prefix is None else (*prefix, token)
                grown.append(((*tokens, *children), known, probability * weight))
        outcomes = grown
    return outcomes


def joint_law_of_target(p: dict[Prefix, torch.Tensor], vocab_size: int, horizon: int) -> torch.Tensor:
    joint = torch.ones((), dtype=torch.float64)
    for length in range(horizon):
        rows = [p[prefix] for prefix in itertools.product(range(vocab_size), repeat=length)]
        joint = joint[..., None] * torch.stack(rows).reshape(*[vocab_size] * length, vocab_size)
    return joint


def joint_law_of_rule(
    rule: Rule,
    tree: DraftTree,
    p: dict[Prefix, torch.Tensor],
    q: dict[Prefix, torch.Tensor],
    *,
    draws: Draws = draws_without_replacement,
    edit_tokens: Callable = lambda tree, tokens, q: tokens,
) -> torch.Tensor:
    """The joint law of the next ``max_depth + 1`` tokens under a rule, by exhaustion.

    Args:
        draws: how the draft draws siblings; the rules assume :func:`draws_without_replacement`.
        edit_tokens: changes the drafted tokens after they were drawn (for planted mistakes).
    """
    vocab_size = len(p[()])
    horizon = tree.max_depth + 1
    uniform = torch.full((vocab_size,), 1 / vocab_size, dtype=torch.float64)
    outcomes = draft_outcomes(tree, q, draws)
    tokens = torch.tensor([outcome[0] for outcome in outcomes])
    weights = torch.tensor([outcome[2] for outcome in outcomes], dtype=torch.float64)

    def rows(laws, nodes):
        return torch.stack(
            [
                torch.stack([uniform if known[node] is None else laws[known[node]] for node in nodes])
                for _, known, _ in outcomes
            ]
        )

    P = rows(p, range(tree.num_nodes))
    Q = rows(q, tree.inner) if tree.inner else P[:, :0]
    tokens = edit_tokens(tree, tokens, Q)

    if rule.needs_draft_law:
        law = traversal if rule.bottom_up else recursive_rejection
        h, emission = law(tree, tokens, P, Q)
        bits = itertools.product([False, True], repeat=tree.num_nodes - 1)
        patterns = torch.tensor([(True, *pattern) for pattern in bits])
        walk = walk_up if rule.bottom_up else walk_down
        stop = walk(tree, patterns)
        branch = torch.where(patterns[None, :, 1:], h[:, None, 1:], 1 - h[:, None, 1:]).prod(-1)
        stops = torch.zeros(len(outcomes), tree.num_nodes, dtype=torch.float64)
        stops.index_add_(1, stop, branch * weights[:, None])
        emitted = stops[..., None] * emission
    else:
        emitted = torch.zeros_like(P)
        for samples in itertools.product(range(vocab_size), repeat=tree.num_nodes):
            sampled = torch.tensor(samples).expand_as(tokens)
            probability = weights * P.gather(-1, sampled[..., None])[..., 0].prod(-1)
            stop = matching(tree, tokens, sampled)
            emitted[torch.arange(len(outcomes)), stop, sampled.gather(1, stop[:, None])[:, 0]] += probability

    joint = torch.zeros([vocab_size] * horizon, dtype=torch.float64)
    for row in range(len(outcomes)):
        for node in range(tree.num_nodes):
            path = tokens[row, list(tree.path(node)[1:])].tolist()
            if min(path, default=0) < 0 or emitted[row, node].sum() == 0:
                continue
            for token in range(vocab_size):
                prefix = (*path, token)
                joint[prefix] += emitted[row, node, token] * _continuation(p, prefix, vocab_size, horizon)
    return joint


def _continuation(p, prefix: Prefix, vocab_size: int, horizon: int) -> torch.Tensor:
    law = torch.ones((), dtype=torch.float64)
    for length in range(horizon - len(prefix)):
        rows = [p[(*prefix, *rest)] for rest in itertools.product(range(vocab_size), repeat=length)]
        law = law[..., None] * torch.stack(rows).reshape(*[vocab_size] * length, vocab_size)
    return law
