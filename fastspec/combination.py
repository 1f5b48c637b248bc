"""Ways of decoding: which draft, which shape of its tree, which rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple

from fastspec.decoder import DEFAULT_GAMMA, resolve_rule, resolve_tree
from fastspec.draft import make_draft
from fastspec.tree import DraftTree
from fastspec.verification import Rule


class Combination(NamedTuple):
    """One way of decoding, temperature apart. Plain decoding has neither draft nor rule, and no branches.

    Attributes:
        draft: as the user named it.
        branching: children of each node by depth; a chain has one each.
        rule: the acceptance rule.
    """

    draft: str | None
    branching: tuple[int, ...]
    rule: str | None

    @property
    def tree(self) -> DraftTree:
        """The tree that each cycle proposes."""
        return DraftTree.kary(self.branching)

    @property
    def shape(self) -> str:
        """The tree in words."""
        if self.draft is None:
            return "-"
        if set(self.branching) == {1}:
            return f"chain {len(self.branching)}"
        return f"tree {','.join(map(str, self.branching))}"


PLAIN = Combination(None, (), None)


def combine(
    drafts: Sequence[str], gammas: Sequence[int], trees: Sequence[str], rules: Sequence[str]
) -> tuple[list[Combination], list[str]]:
    """All ways of speculating, and why some drafts, shapes and rules were not put together.

    Args:
        drafts: as the user named them.
        gammas: lengths of chains.
        trees: branching factors of k-ary trees, such as ``"3,2,1"``.
        rules: names of rules; none means the default of each draft and shape.

    Raises:
        ValueError: for a bad shape or rule, or one that goes with nothing else that was asked for.
    """
    shapes = [DraftTree.chain(gamma) for gamma in gammas] + list(map(_tree, trees))
    shapes = distinct("shape of the draft", shapes) or [DraftTree.chain(DEFAULT_GAMMA)]
    names = [rule.value for rule in Rule]
    for rule in rules:
        if rule not in names:
            raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(map(repr, names))}")
    rules = distinct("rule", rules) or [None]
    drafts = distinct("draft", drafts)
    if not drafts:
        raise ValueError("expected at least one draft, got none")

    combinations, refused = [], {}
    for draft, tree, rule in product(drafts, shapes, rules):
        # Whatever else is loaded proposes any tree and knows its law.
        known = make_draft("ngram") if draft == "ngram" else None
        try:
            if known is not None:
                resolve_tree(known, None, tree)
            resolved = resolve_rule(known, tree, rule)
        except ValueError as error:
            refused[draft, tree, rule] = str(error)
        else:
            combinations.append((draft, tree, rule, resolved))
    for place, options in enumerate((drafts, shapes, rules)):
        for option in options:
            if not any(one[place] == option for one in combinations):
                raise ValueError(next(reason for key, reason in refused.items() if key[place] == option))
    made = [Combination(draft, _branching(tree), rule.value) for draft, tree, _, rule in combinations]
    left_out = [
        f"{Combination(draft, _branching(tree), None).shape} of {draft}: {reason}"
        for (draft, tree, _), reason in refused.items()
    ]
    return made, left_out


def _tree(text: str) -> DraftTree:
    factors = text.split(",")
    if not all(factor.strip().isdecimal() for factor in factors):
        raise ValueError(f"tree must be branching factors by depth, such as 3,2,1, got {text!r}")
    return DraftTree.kary(tuple(map(int, factors)))


def _branching(tree: DraftTree) -> tuple[int, ...]:
    """Children of the nodes of each level; the trees here are k-ary."""
    return tuple(len(tree.children[level[0]]) for level in tree.levels)


def distinct(name: str, values: Sequence[Hashable]) -> list:
    """The values as a list; raises ValueError for one that was given twice."""
    for value, times in Counter(values).items():
        if times > 1:
            shown = Combination("", _branching(value), None).shape if isinstance(value, DraftTree) else value
            raise ValueError(f"{name} {shown!r} was given {times} times")
    return list(values)
