import numpy as np
import pytest
import torch

from fastspec import DraftTree


def test_chain_and_kary():
    chain = DraftTree.chain(3)
    assert chain.parents == (-1, 0, 1, 2)
    assert chain.is_chain
    assert chain.max_depth == 3
    tree = DraftTree.kary((3, 2))
    assert tree.num_nodes == 10
    assert tree.depths == (0, 1, 1, 1, 2, 2, 2, 2, 2, 2)
    assert tree.children[1] == (4, 5)
    assert tree.levels == ((0,), (1, 2, 3))
    assert not tree.is_chain


def test_from_children_renumbers_in_level_order_and_keeps_siblings():
    tree = DraftTree.from_children([[3, 1], [], [], [2]])
    assert tree.parents == (-1, 0, 0, 1)
    assert tree.path(3) == (0, 1, 3)
    assert tree.post_order == (3, 1, 2, 0)


def test_mask_is_ancestors_and_self():
    tree = DraftTree.kary((2, 2))
    mask = tree.on("cpu").mask
    for row in range(tree.num_nodes):
        assert set(mask[row].nonzero()[:, 0].tolist()) == set(tree.path(row))


def test_paths_are_padded_with_their_node():
    tables = DraftTree.from_children([[1, 2], [3], [], []]).on("cpu")
    assert tables.paths.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3]]


def test_root_alone_is_a_tree():
    tree = DraftTree.chain(0)
    assert (tree.num_nodes, tree.max_depth, tree.inner, tree.levels) == (1, 0, (), ())
    assert torch.equal(tree.on("cpu").paths, torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DraftTree(()), r"parents\[0\] == -1, got \(\)"),
        (lambda: DraftTree((0,)), r"parents\[0\] == -1, got \(0,\)"),
        (lambda: DraftTree((-1, 1)), r"parents\[1\] must name an earlier node \(0 to 0\), got 1"),
        (
            lambda: DraftTree((-1, 0, 0, 2, 1)),
            r"level by level.*parents\[4\] = 1 comes after parents\[3\] = 2",
        ),
        (lambda: DraftTree((-1, *[0] * 128)), "at most 128 nodes, got 129"),
        (lambda: DraftTree.chain(-1), "gamma must be an integer from 0 to 127, got -1"),
        (lambda: DraftTree.chain(2.0), "gamma must be an integer from 0 to 127, got 2.0"),
        (lambda: DraftTree.kary((2, 0)), "at least 1, got 0"),
        (lambda: DraftTree.kary((64, 2)), r"kary\(\(64, 2\)\) has more than 128 nodes"),
        (
            lambda: DraftTree.from_children([[1], [1]]),
            "node 1 under node 1 is out of range or has a second parent",
        ),
        (lambda: DraftTree.from_children([[], []]), r"nodes \[1\] cannot be reached"),
    ],
)
def test_malformed_trees_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_any_integer_is_a_length():
    assert DraftTree.chain(np.int64(3)) == DraftTree.chain(3)
