"""The CUDA kernels of verification and proposals, emulated on a CPU, against the reference; see ``emulation.py``."""

import contextlib
import sys
from types import SimpleNamespace

import emulation
import pytest
import test_propose
import torch
from kernel_cases import random_case
from test_verify import GREEDY_TREES, assert_same, check_greedy_paths, compare, compare_siblings, run

from fastspec import DraftTree
from fastspec.ops import Verifier
from fastspec.verification import Rule

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")


@pytest.fixture(scope="module")
def extension(tmp_path_factory, request):
    folder = tmp_path_factory.getbasetemp()
    return emulation.load(folder.parent if hasattr(request.config, "workerinput") else folder)


@pytest.fixture(autouse=True)
def emulated(extension, monkeypatch):
    """Where ``"cuda"`` is asked for, tensors of the CPU will do."""
    for name in ("verify", "propose"):
        module = sys.modules[f"fastspec.ops.{name}"]
        monkeypatch.setattr(module, "extension", lambda: extension)
        monkeypatch.setattr(
            module, "choose", lambda backend, device, supported: backend if supported else "reference"
        )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


@pytest.mark.parametrize("part", range(2))
def test_verification_equals_the_reference(part, exhaustive):
    seeds = 1000 if exhaustive else 40
    compare(range(seeds * part, seeds * (part + 1)), "cuda", "cpu")


def test_proposals_equal_the_reference(exhaustive):
    test_propose.compare(range(300 if exhaustive else 25), "cuda", "cpu")


@pytest.mark.parametrize("branching", [(3, 2, 1), (8,), (3, 4, 4)], ids=str)
def test_siblings_are_rejected_one_after_the_other(branching, exhaustive):
    seeds = range(6000, 6040 if exhaustive else 6006)
    compare_siblings(seeds, branching, "cuda", "cpu", (33, 513, 4097))


@pytest.mark.parametrize("tree", GREEDY_TREES, ids=lambda tree: str(tree.num_nodes))
def test_greedy_paths_to_every_node(tree):
    nodes = list(range(tree.num_nodes))
    check_greedy_paths(tree, Rule.TARGET_ONLY, "cuda", "cpu", [nodes[::2], *([one] for one in nodes[1::8])])


def test_results_do_not_depend_on_the_launch_shape():
    """Blocks with one slice of the vocabulary or all of them, run after run in the same mailbox."""
    vocabularies = (2049, 4097)
    for seed in range(2000, 2008):
        case = random_case(seed, vocabularies=vocabularies)
        if case.rule is Rule.TRAVERSAL and not case.tree.is_chain:
            continue
        expected = run(case, "reference")
        batch, _, vocab_size = case.target_logits.shape
        for group_size in (1, 3):
            verifier = Verifier(case.tree, batch, vocab_size, case.rule, "cpu", "cuda")
            verifier._group_size = group_size
            draft_logits = case.draft_logits if case.rule.needs_draft_law else None
            for _ in range(3):
                got = verifier(case.target_logits, case.tokens, case.sampling, case.positions, draft_logits)
                assert_same(expected, got, f"{case.description}, groups of {group_size}")


def test_slices_of_two_tiles(exhaustive):
    vocab_size = 66049
    check_greedy_paths(DraftTree.kary((3, 2, 2)), Rule.TARGET_ONLY, "cuda", "cpu", [[0, 7], [20]], vocab_size)
    compare(range(5000, 5020 if exhaustive else 5004), "cuda", "cpu", vocabularies=(vocab_size,), max_nodes=8)
