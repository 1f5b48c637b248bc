"""Every rule is lossless by enumeration, and every planted mistake is caught by the same measure."""

import pytest
import torch
from enumeration import (
    draws_with_replacement,
    draws_without_replacement,
    joint_law_of_rule,
    joint_law_of_target,
    random_laws,
    top_children,
)

from fastspec import DraftTree, verification
from fastspec.verification import Rule, recursive_rejection, traversal, walk_down, walk_up

TREES = {
    "chain1": DraftTree.chain(1),
    "chain3": DraftTree.chain(3),
    "fork": DraftTree.kary((2,)),
    "fork3": DraftTree.kary((3,)),
    "forked chain": DraftTree.kary((2, 1)),
    "binary": DraftTree.kary((2, 2)),
    "uneven": DraftTree.from_children([[1, 2], [3], [], [4, 5], [], []]),
}
KINDS = ("dense", "zeros", "onehot", "flat")


def error(rule, tree, p, q, **planted):
    """Total absolute error of the joint law."""
    vocab_size = len(p[()])
    law = joint_law_of_rule(rule, tree, p, q, **planted)
    return (law - joint_law_of_target(p, vocab_size, tree.max_depth + 1)).abs().sum().item()


def laws(tree, p_kind, q_kind, seed, vocab_size=3):
    generator = torch.Generator().manual_seed(seed)
    p = random_laws(vocab_size, tree.max_depth, generator, p_kind)
    return p, random_laws(vocab_size, tree.max_depth, generator, q_kind)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("rule", Rule)
def test_every_rule_is_lossless(rule, tree):
    if rule in (Rule.TOKEN_LEVEL, Rule.BLOCK) and not tree.is_chain:
        with pytest.raises(ValueError, match="needs a chain"):
            rule.check(tree)
        return
    if not rule.needs_draft_law and tree.num_nodes > 5:
        tree = DraftTree(tree.parents[:5])  # V**N samples are enumerated
    for seed, (p_kind, q_kind) in enumerate((a, b) for a in KINDS for b in KINDS):
        p, q = laws(tree, p_kind, q_kind, seed)
        assert error(rule, tree, p, q) < 1e-12, (p_kind, q_kind)
        assert error(rule, tree, p, p) < 1e-12, "p = q"


@pytest.mark.parametrize("rule", [Rule.RECURSIVE_REJECTION, Rule.TRAVERSAL])
def test_random_trees(rule):
    generator = torch.Generator().manual_seed(11)
    for seed in range(12):
        parents = [-1]
        while len(parents) < 6:
            low = max(parents[-1], 0)
            parents.append(int(torch.randint(low, len(parents), (), generator=generator)))
        tree = DraftTree(tuple(parents))
        if tree.max_depth > 3:
            continue
        p, q = laws(tree, "dense", ("dense", "zeros")[seed % 2], seed)
        assert error(rule, tree, p, q) < 1e-12, parents


@pytest.mark.parametrize("tree", [DraftTree.chain(1), DraftTree.kary((2, 1)), DraftTree.kary((3,))])
def test_target_only_is_indifferent_to_how_the_tree_was_built(tree):
    for seed in range(4):
        p, q = laws(tree, "dense", "dense", seed)
        for draws in (top_children, draws_with_replacement, draws_without_replacement):
            assert error(Rule.TARGET_ONLY, tree, p, q, draws=draws) < 1e-12


def test_block_verification_is_the_formula_of_its_paper():
    """h by Sun et al., written out independently, equals traversal on a chain."""
    generator = torch.Generator().manual_seed(3)
    gamma, vocab_size = 4, 5
    p = torch.rand(64, gamma + 1, vocab_size, generator=generator, dtype=torch.float64).softmax(-1) ** 3
    q = torch.rand(64, gamma, vocab_size, generator=generator, dtype=torch.float64) ** 3
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    x = torch.randint(vocab_size, (64, gamma), generator=generator)
    tokens = torch.cat([torch.zeros(64, 1, dtype=torch.int64), x], dim=1)
    h, emission = traversal(DraftTree.chain(gamma), tokens, p, q)
    for row in range(64):
        r = 1.0
        for i in range(gamma + 1):
            if i > 0:
                r = min(1.0, r * float(p[row, i - 1, x[row, i - 1]] / q[row, i - 1, x[row, i - 1]]))
            if i == gamma:
                expected, law = r, p[row, i]
            else:
                rest = (r * p[row, i] - q[row, i]).clamp(min=0)
                s = float(rest.sum())
                expected = 1.0 if s + 1 - r == 0 else s / (s + 1 - r)
                law = rest / s if s > 0 else p[row, i]
            if i > 0:
                assert h[row, i].item() == pytest.approx(expected, abs=1e-12)
            torch.testing.assert_close(emission[row, i], law, rtol=0, atol=1e-12)


def test_bottom_up_rules_accept_at_least_as_much():
    """Expected accepted tokens: block >= token-level, traversal >= recursive rejection."""

    def expected_length(law, tree, outcomes_seed):
        p, q = laws(tree, "dense", "dense", outcomes_seed)
        joint = 0.0
        from enumeration import draft_outcomes

        for tokens, known, weight in draft_outcomes(tree, q, draws_without_replacement):
            row = torch.tensor([tokens])
            uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
            P = torch.stack([uniform if known[n] is None else p[known[n]] for n in range(tree.num_nodes)])[
                None
            ]
            Q = torch.stack([uniform if known[n] is None else q[known[n]] for n in tree.inner])[None]
            h = law(tree, row, P, Q)[0]
            order = tree.post_order[:-1] if law is traversal else None
            if order is not None:
                failed = 1.0
                for node in order:
                    joint += weight * failed * float(h[0, node]) * tree.depths[node]
                    failed *= 1 - float(h[0, node])
            else:
                reach = {0: 1.0}
                for node in tree.inner:
                    failed = reach[node]
                    for child in tree.children[node]:
                        reach[child] = failed * float(h[0, child])
                        failed -= reach[child]
                        joint += weight * reach[child]
        return joint

    for tree in (TREES["chain3"], TREES["binary"]):
        for seed in range(3):
            up, down = (expected_length(law, tree, seed) for law in (traversal, recursive_rejection))
            assert up >= down - 1e-12
            if tree.is_chain:
                assert up > down


def test_walks_agree_with_brute_force():
    generator = torch.Generator().manual_seed(0)
    tree = TREES["uneven"]
    accepted = torch.rand(200, tree.num_nodes, generator=generator) < 0.5
    for bits, down, up in zip(
        accepted.tolist(), walk_down(tree, accepted), walk_up(tree, accepted), strict=True
    ):
        node = 0
        while True:
            child = next((child for child in tree.children[node] if bits[child]), None)
            if child is None:
                break
            node = child
        assert down == node
        assert up == next((node for node in tree.post_order[:-1] if bits[node]), 0)


def test_greedy_is_temperature_zero():
    """One-hot laws accept exactly the path of argmaxes, including a greedy draft's second choices."""
    tree = DraftTree.kary((2, 2))
    p = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 0, 0, 1, 2]]), 3).double()
    q = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1]]), 3).double()
    tokens = torch.tensor([[-1, 0, 1, 1, 0, 1, 0]])
    for law, walk in ((recursive_rejection, walk_down), (traversal, walk_up)):
        h, emission = law(tree, tokens, p, q)
        assert set(h[0, 1:].tolist()) <= {0.0, 1.0}
        stop = walk(tree, h > 0.5)
        assert stop.item() == 6  # 1 is the argmax at the root (node 2), then 0 (node 6)
        assert emission[0, 6].argmax() == 2


def test_residual_that_is_zero_only_by_rounding_falls_back_to_p():
    p = torch.tensor([[[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]], dtype=torch.float64)
    for law in (recursive_rejection, traversal):
        _, emission = law(DraftTree.chain(1), torch.tensor([[-1, 1]]), p, p[:, :1].clone())
        torch.testing.assert_close(emission[0, 0], p[0, 0])


# Planted mistakes, each seen in a released engine: the enumeration must be far off.


def planted_independent_siblings(tree, tokens, p, q):
    h, emission = recursive_rejection(tree, tokens, p, q)
    for node in tree.inner:
        P, Q = p[:, node], q[:, tree.inner_index[node]]
        for child in tree.children[node]:
            token = tokens[:, child].clamp(min=0)[:, None]
            h[:, child] = (P.gather(1, token) / Q.gather(1, token))[:, 0].clamp(max=1)
        rest = (P - Q).clamp(min=0)
        emission[:, node] = rest / rest.sum(-1, keepdim=True)
    return h, emission


def planted_traversal_weight(tree, tokens, p, q, valid=None):
    """a(n) <- S / (1 - Q(x)) instead of S / (S + 1 - a(n))."""
    h, emission = torch.zeros_like(p[..., 0]), p.clone()

    def visit(node, a):
        P = p[:, node]
        Q = q[:, tree.inner_index[node]] if tree.children[node] else None
        for child in tree.children[node]:
            token = tokens[:, child].clamp(min=0)[:, None]
            p_x, q_x = P.gather(1, token)[:, 0], Q.gather(1, token)[:, 0]
            visit(child, (a * p_x / q_x).clamp(max=1))
            rest = (a[:, None] * P - Q).clamp(min=0)
            if node != 0:
                a = (rest.sum(-1) / (1 - q_x)).clamp(max=1)
            P = rest / rest.sum(-1, keepdim=True).clamp(min=1e-300)
            Q = Q.scatter(1, token, 0.0)
            Q = Q / Q.sum(-1, keepdim=True)
        h[:, node], emission[:, node] = a, P

    visit(0, torch.ones_like(h[:, 0]))
    return h, emission


def sorted_by_q(tree, tokens, q):
    tokens = tokens.clone()
    for node in tree.inner:
        children = list(tree.children[node])
        drawn = tokens[:, children]
        order = q[:, tree.inner_index[node]].gather(1, drawn).argsort(dim=1, descending=True)
        tokens[:, children] = drawn.gather(1, order)
    return tokens


def without_improbable(tree, tokens, q):
    """Early stop that throws the low-confidence token away after it was drawn."""
    tokens = tokens.clone()
    for node in tree.inner:
        for child in tree.children[node]:
            confidence = q[:, tree.inner_index[node]].gather(1, tokens[:, child].clamp(min=0)[:, None])[:, 0]
            tokens[:, child] = torch.where(confidence < 0.4, -1, tokens[:, child])
    return tokens


FORK = DraftTree.kary((2,))
TRAPS = {
    "ratio rule on deterministic top-k children": (
        Rule.RECURSIVE_REJECTION,
        FORK,
        {"draws": top_children},
        {},
    ),
    "siblings tested independently": (
        Rule.RECURSIVE_REJECTION,
        FORK,
        {},
        {"recursive_rejection": planted_independent_siblings},
    ),
    "with-replacement rule on children drawn without": (
        Rule.RECURSIVE_REJECTION,
        DraftTree.kary((3,)),
        {},
        {"_without": lambda law, token: law},
    ),
    "siblings re-sorted by q": (Rule.RECURSIVE_REJECTION, FORK, {"edit_tokens": sorted_by_q}, {}),
    "siblings pruned on their value": (
        Rule.RECURSIVE_REJECTION,
        FORK,
        {"edit_tokens": without_improbable},
        {},
    ),
    "duplicates among siblings": (Rule.RECURSIVE_REJECTION, FORK, {"draws": draws_with_replacement}, {}),
    "early stop drops the low-confidence token": (
        Rule.TOKEN_LEVEL,
        DraftTree.chain(2),
        {"edit_tokens": without_improbable},
        {},
    ),
    "traversal with a(n) <- S / (1 - Q(x))": (
        Rule.TRAVERSAL,
        DraftTree.kary((2, 2)),
        {},
        {"traversal": planted_traversal_weight},
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_planted_mistakes_are_caught(trap, monkeypatch):
    rule, tree, planted, patches = TRAPS[trap]
    vocab_size = 4 if tree.max_depth == 1 else 3
    clean = max(error(rule, tree, *laws(tree, "dense", "dense", seed, vocab_size)) for seed in range(4))
    assert clean < 1e-12
    import enumeration

    for name, replacement in patches.items():
        monkeypatch.setattr(verification, name, replacement)
        monkeypatch.setattr(enumeration, name, replacement, raising=False)
    worst = max(
        error(rule, tree, *laws(tree, "dense", "dense", seed, vocab_size), **planted) for seed in range(4)
    )
    assert worst > 0.02


def test_q_from_other_logits_than_those_sampled_is_caught():
    """The draft samples after warping but stores q from before it."""
    tree = DraftTree.chain(1)
    p, q = laws(tree, "dense", "dense", 1)
    sampled = q[()] ** 2 / (q[()] ** 2).sum()
    assert (
        error(
            Rule.TOKEN_LEVEL, tree, p, q, draws=lambda law, count: draws_without_replacement(sampled, count)
        )
        > 0.05
    )
