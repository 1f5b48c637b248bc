"""Draft trees: which node hangs under which, fixed for a whole generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from numbers import Integral

import torch

#: Rows of logits that verification reads together, target and draft.
ROWS_AT_ONCE = 32

MAX_NODES = 128


def check_gamma(gamma: int, least: int) -> None:
    """Raises ValueError unless gamma is a whole number of drafted tokens that a tree can hold."""
    if isinstance(gamma, bool) or not isinstance(gamma, Integral) or not least <= gamma < MAX_NODES:
        raise ValueError(f"gamma must be an integer from {least} to {MAX_NODES - 1}, got {gamma!r}")


@dataclass(frozen=True)
class DraftTree:
    """Topology of the tokens that one cycle proposes. A chain is a tree with one child per node.

    Node 0 is the root: the last committed token, whose key and value the target computes in the same pass.
    Nodes are numbered level by level, siblings in the order in which the draft draws them.

    Args:
        parents: parent of each node; ``parents[0]`` is -1. Must be in level order.

    Raises:
        ValueError: if the parents are not a tree in level order, or there are more than 128 nodes.

    Example:
        >>> DraftTree.chain(5).num_nodes, DraftTree.kary((3, 2)).num_nodes
        (6, 10)
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...] = field(init=False, compare=False, repr=False)
    children: tuple[tuple[int, ...], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        parents = tuple(int(parent) for parent in self.parents)
        if not parents or parents[0] != -1:
            raise ValueError(
                f"a DraftTree starts with its root: expected parents[0] == -1, got {parents[:1]}"
            )
        if len(parents) > MAX_NODES:
            raise ValueError(f"a DraftTree has at most {MAX_NODES} nodes, got {len(parents)}")
        depths, children = [0], [[] for _ in parents]
        for node, parent in enumerate(parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"parents[{node}] must name an earlier node (0 to {node - 1}), got {parent}")
            if parent < parents[node - 1]:
                raise ValueError(
                    "nodes must be numbered level by level, siblings side by side: "
                    f"parents[{node}] = {parent} comes after parents[{node - 1}] = {parents[node - 1]}"
                )
            depths.append(depths[parent] + 1)
            children[parent].append(node)
        object.__setattr__(self, "parents", parents)
        object.__setattr__(self, "depths", tuple(depths))
        object.__setattr__(self, "children", tuple(map(tuple, children)))

    @classmethod
    def chain(cls, gamma: int) -> DraftTree:
        """``gamma`` draft tokens, each after the last. ``gamma`` = 0 is plain decoding.

        Raises:
            ValueError: if gamma is negative or over 127.
        """
        check_gamma(gamma, least=0)
        return cls(tuple(range(-1, int(gamma))))

    @classmethod
    def kary(cls, branching: Sequence[int]) -> DraftTree:
        """Every node of depth d has ``branching[d]`` children: ``kary((4, 2, 1))`` has 1 + 4 + 8 + 8 nodes.

        Raises:
            ValueError: if a branching factor is below 1 or the tree is too large.
        """
        parents, level = [-1], [0]
        for width in branching:
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"branching factors are integers of at least 1, got {width!r}")
            if len(parents) + len(level) * width > MAX_NODES:
                raise ValueError(f"kary({tuple(branching)}) has more than {MAX_NODES} nodes")
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents)))
        return cls(tuple(parents))

    @classmethod
    def from_children(cls, children: Sequence[Sequence[int]]) -> DraftTree:
        """A tree from the list of each node's children, in any numbering with root 0; it is renumbered in
        level order, siblings kept in the order given.

        Raises:
            ValueError: if a node is missing, has two parents, or lies on a cycle.
        """
        parents, order = [-1], [0]
        renumbered = {0: 0}
        for node in order:
            for child in children[node]:
                if not 0 < child < len(children) or child in renumbered:
                    raise ValueError(
                        f"node {child!r} under node {node} is out of range or has a second parent; "
                        f"expected each of 1 to {len(children) - 1} once"
                    )
                renumbered[child] = len(order)
                order.append(child)
                parents.append(renumbered[node])
        if len(order) != len(children):
            missing = sorted(set(range(len(children))) - set(order))
            raise ValueError(f"nodes {missing} cannot be reached from the root")
        return cls(tuple(parents))

    @property
    def num_nodes(self) -> int:
        """N, the rows of one target pass, the root included."""
        return len(self.parents)

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node: the most tokens that one cycle can accept."""
        return max(self.depths)

    @cached_property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return self.max_depth == self.num_nodes - 1

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """Nodes that have children, in order: the rows of the draft's distributions."""
        return tuple(node for node in range(self.num_nodes) if self.children[node])

    @cached_property
    def inner_index(self) -> dict[int, int]:
        """Row of each inner node among the draft's distributions."""
        return {node: row for row, node in enumerate(self.inner)}

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Inner nodes by depth: one draft pass each."""
        return tuple(
            tuple(node for node in self.inner if self.depths[node] == depth)
            for depth in range(self.max_depth)
        )

    @cached_property
    def post_order(self) -> tuple[int, ...]:
        """Nodes with every subtree before its own root, siblings in order; the root is last."""
        order = []

        def visit(node):
            for child in self.children[node]:
                visit(child)
            order.append(node)

        visit(0)
        return tuple(order)

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root to ``node``, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def ahead(self, node: int) -> tuple[int, int]:
        """How many of the nodes that follow ``node``'s first child, and rows of the draft, are read with its own.

        They are descendants of the node, without a gap, as many as :data:`ROWS_AT_ONCE` allows.
        """
        if not self.children[node]:
            return 0, 0
        first = end = self.children[node][0]
        rows, inner = 2, 0
        while end < self.num_nodes and (self.parents[end] == node or first <= self.parents[end] < end):
            rows += 2 if self.children[end] else 1
            if rows > ROWS_AT_ONCE:
                break
            inner += bool(self.children[end])
            end += 1
        return end - first, inner

    def on(self, device: torch.device | str) -> TreeTensors:
        """The topology as tensors on a device; made once per device."""
        return _tree_tensors(self, torch.device(device))


@dataclass(frozen=True)
class TreeTensors:
    """A DraftTree's tables on a device.

    Attributes:
        depths: ``[N]`` int64.
        parents: ``[N]`` int64; the root's is 0.
        paths: ``[N, D + 1]`` int64, the nodes from the root to each node, padded with the node itself.
        mask: ``[N, N]`` bool, true where the column is an ancestor of the row or the row itself.
        inner: ``[N_inner]`` int64, the nodes that have children.
        inner_rows: ``[N]`` int64, for each node the row of its parent among the draft's distributions; 0 for
            the root.
        table: ``[N, 8]`` int32, what the kernels read (``TreeNode`` in csrc/params.h).
    """

    depths: torch.Tensor
    parents: torch.Tensor
    paths: torch.Tensor
    mask: torch.Tensor
    inner: torch.Tensor
    inner_rows: torch.Tensor
    table: torch.Tensor


@lru_cache(maxsize=64)
def _tree_tensors(tree: DraftTree, device: torch.device) -> TreeTensors:
    paths = [tree.path(node) for node in range(tree.num_nodes)]
    mask = torch.zeros(tree.num_nodes, tree.num_nodes, dtype=torch.bool)
    for node, path in enumerate(paths):
        mask[node, list(path)] = True
    rows = tree.inner_index
    table = torch.zeros(tree.num_nodes, 8, dtype=torch.int32)
    for node, children in enumerate(tree.children):
        first = children[0] if children else 0
        inner_node = tree.inner[node] if node < len(tree.inner) else 0
        num_ahead, num_inner_ahead = tree.ahead(node)
        first_inner_ahead = next((row for inner, row in rows.items() if inner >= first), 0)
        place = (tree.parents[node], tree.depths[node], first, len(children), rows.get(node, -1), inner_node)
        table[node] = torch.tensor((*place, first_inner_ahead, num_ahead | num_inner_ahead << 16))
    padded = [path + (path[-1],) * (tree.max_depth + 1 - len(path)) for path in paths]
    return TreeTensors(
        depths=torch.tensor(tree.depths, device=device),
        parents=torch.tensor(tree.parents, device=device).clamp_(min=0),
        paths=torch.tensor(padded, device=device),
        mask=mask.to(device),
        inner=torch.tensor(tree.inner, dtype=torch.long, device=device),
        inner_rows=torch.tensor([rows.get(parent, 0) for parent in tree.parents], device=device),
        table=table.to(device),
    )
