"""The acceptance rules: which path of the draft tree the target keeps, and the law of the token after it.

Every rule is exact: the emitted tokens have the joint law of plain sampling from the target, for every draft.
A rule has two halves, so that each can be read, enumerated and tested on its own:

* the *law*: acceptance probabilities and emission laws as deterministic functions of p, q and the drafted
  tokens (:func:`recursive_rejection`, :func:`traversal`), or one sample of each row (:func:`matching`);
* the *walk*: from accept bits to the node where the path stops (:func:`walk_down`, :func:`walk_up`).

Shapes: B sequences, N tree nodes, V tokens, N_inner nodes with children. ``p`` is ``[B, N, V]`` float64, the
target's law at each node; ``q`` is ``[B, N_inner, V]`` float64, the law each node's children were drawn from;
``tokens`` is ``[B, N]`` int64, -1 where the draft proposed nothing. Loops run over the static tree, never
over values.
"""

from __future__ import annotations

from enum import Enum

import torch

from fastspec.tree import DraftTree


class Rule(str, Enum):
    """How drafted tokens are accepted.

    ===================  ====================================================================================
    TOKEN_LEVEL          chain; accept x with min(1, p/q) (Leviathan et al. 2211.17192, Chen et al. 2302.01318)
    BLOCK                chain; block verification, never worse than token-level (Sun et al. 2403.10444)
    RECURSIVE_REJECTION  tree, siblings drawn without replacement (RSD 2402.14160, Sequoia 2402.12374)
    TRAVERSAL            tree, bottom-up, never worse than recursive rejection (2505.12398)
    TARGET_ONLY          any tree however built: sample the target's row, follow it while it is a child
    DRAFTER_INVARIANT    target-only with noise keyed by position and shared with the draft: the text does not
                         depend on the draft (Daliri et al. 2408.07978)
    ===================  ====================================================================================

    At temperature 0 every rule is greedy decoding.
    """

    TOKEN_LEVEL = "token_level"
    BLOCK = "block"
    RECURSIVE_REJECTION = "recursive_rejection"
    TRAVERSAL = "traversal"
    TARGET_ONLY = "target_only"
    DRAFTER_INVARIANT = "drafter_invariant"

    @property
    def needs_draft_law(self) -> bool:
        """Whether the rule weighs p against the draft's q, which then must be the law sampled from."""
        return self not in (Rule.TARGET_ONLY, Rule.DRAFTER_INVARIANT)

    @property
    def bottom_up(self) -> bool:
        """Whether the rule tests leaves first."""
        return self in (Rule.BLOCK, Rule.TRAVERSAL)

    def check(self, tree: DraftTree) -> None:
        """Raises ValueError where the rule does not fit the tree."""
        if self in (Rule.TOKEN_LEVEL, Rule.BLOCK) and not tree.is_chain:
            instead = Rule.RECURSIVE_REJECTION if self is Rule.TOKEN_LEVEL else Rule.TRAVERSAL
            raise ValueError(
                f"rule {self.value!r} needs a chain, got a tree of {tree.num_nodes} nodes with siblings; "
                f"use {instead.value!r}"
            )


def _at(law: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return law.gather(-1, token.clamp(min=0)[:, None])[:, 0]


def _acceptance(
    a: torch.Tensor | float, p: torch.Tensor, q: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """min(1, a p / q); where q is 0 (a greedy draft's second choice) 1 if p > 0, else 0."""
    ratio = torch.where(q > 0, a * p / torch.where(q > 0, q, 1.0), (a * p > 0).double())
    return torch.where(present, ratio.clamp(max=1.0), 0.0)


def _normalised(law: torch.Tensor, total: torch.Tensor, fallback: torch.Tensor) -> torch.Tensor:
    """``law / total``, or ``fallback`` where rounding alone left nothing."""
    total = total[:, None]
    return torch.where(total > 0, law / torch.where(total > 0, total, 1.0), fallback)


def _without(law: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """``law`` conditioned on not being ``token``; all zero when nothing is left."""
    rest = law.scatter(-1, token.clamp(min=0)[:, None], 0.0)
    return _normalised(rest, rest.sum(-1), torch.zeros_like(rest))


def recursive_rejection(
    tree: DraftTree, tokens: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-down ratio tests over siblings drawn without replacement; on a chain, token-level verification.

    Returns:
        h ``[B, N]``, the probability to accept each node given that its parent was accepted and its earlier
        siblings were not; and the emission law ``[B, N, V]`` if the path stops at a node.
    """
    h = torch.zeros_like(p[..., 0])
    emission = p.clone()
    for node in tree.inner:
        P, Q = p[:, node], q[:, tree.inner_index[node]]
        for child in tree.children[node]:
            token = tokens[:, child]
            present = token >= 0
            h[:, child] = _acceptance(1.0, _at(P, token), _at(Q, token), present)
            residual = (P - Q).clamp(min=0)
            P = torch.where(present[:, None], _normalised(residual, residual.sum(-1), P), P)
            Q = torch.where(present[:, None], _without(Q, token), Q)
        emission[:, node] = P
    return h, emission


def traversal(
    tree: DraftTree, tokens: torch.Tensor, p: torch.Tensor, q: torch.Tensor, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bottom-up tests of whole paths in post-order; on a chain, block verification.

    Args:
        valid: ``[B, N]`` bool, rows of p that are laws. A node without one keeps its weight and loses its
            children: the path then stops there exactly as often as plain decoding would reach it.

    Returns:
        h ``[B, N]``, the probability to accept the path to a node given that all nodes before it in
        post-order failed (1 for the root); and the emission law ``[B, N, V]`` if it is accepted.
    """
    h = torch.zeros_like(p[..., 0])
    emission = p.clone()

    def visit(node: int, a: torch.Tensor) -> None:
        P = p[:, node]
        Q = q[:, tree.inner_index[node]] if tree.children[node] else None
        for child in tree.children[node]:
            token = tokens[:, child]
            present = token >= 0
            if valid is not None:
                present = present & valid[:, node]
            visit(child, _acceptance(a, _at(P, token), _at(Q, token), present))
            residual = (a[:, None] * P - Q).clamp(min=0)
            mass = residual.sum(-1)
            if node != 0:
                denominator = mass + 1 - a
                kept = torch.where(
                    denominator > 0, mass / torch.where(denominator > 0, denominator, 1.0), 1.0
                )
                a = torch.where(present, kept, a)
            P = torch.where(present[:, None], _normalised(residual, mass, P), P)
            Q = torch.where(present[:, None], _without(Q, token), Q)
        h[:, node] = a
        emission[:, node] = P

    visit(0, torch.ones_like(h[:, 0]))
    return h, emission


def walk_down(tree: DraftTree, accepted: torch.Tensor) -> torch.Tensor:
    """Follows accepted children from the root, the first accepted sibling winning.

    Args:
        accepted: ``[B, N]`` bool outcomes of the tests; the root's is ignored.

    Returns:
        ``[B]`` int64, the node where the path stops.
    """
    reached = [torch.ones_like(accepted[:, 0])] + [None] * (tree.num_nodes - 1)
    stop = torch.zeros(accepted.shape[0], dtype=torch.int64, device=accepted.device)
    for node in tree.inner:
        open_ = reached[node]
        for child in tree.children[node]:
            reached[child] = open_ & accepted[:, child]
            open_ = open_ & ~accepted[:, child]
            stop = torch.where(reached[child], child, stop)
    return stop


def walk_up(tree: DraftTree, accepted: torch.Tensor) -> torch.Tensor:
    """The first accepted node in post-order; the root if there is none. Shapes as :func:`walk_down`."""
    stop = torch.zeros(accepted.shape[0], dtype=torch.int64, device=accepted.device)
    for node in reversed(tree.post_order[:-1]):
        stop = torch.where(accepted[:, node], node, stop)
    return stop


def matching(tree: DraftTree, tokens: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Target-only acceptance: a child is accepted iff it is the token sampled at its parent.

    Args:
        samples: ``[B, N]`` int64, one sample of each row of p.

    Returns:
        ``[B]`` int64, the node where the path stops; the next token is that node's sample.
    """
    parents = tree.on(tokens.device).parents
    return walk_down(tree, (tokens == samples[:, parents]) & (tokens >= 0))
