"""Commitment: the kernels do what the reference does, and nothing else."""

import copy
import random

import pytest
import torch

from fastspec import DraftTree
from fastspec.model.cache import StaticCache
from fastspec.ops.commit import Committer
from fastspec.ops.verify import Verdict
from fastspec.sampling import SamplingParams
from fastspec.state import DecodeState, FinishReason

VOCAB_SIZE = 50
CAPACITY = 40
TREES = [
    DraftTree.chain(0),
    DraftTree.chain(5),
    DraftTree.chain(40),
    DraftTree.kary((3, 2, 1)),
    DraftTree.from_children([[1, 2, 3], [4, 5], [6], [], [7], [], [], []]),
]


def random_state(tree, batch, rng, device):
    """A state in the middle of a generation, with sequences at all kinds of ends."""
    state = DecodeState(batch, CAPACITY, tree, VOCAB_SIZE, device)
    prompt = torch.tensor([rng.randrange(VOCAB_SIZE) for _ in range(9)], device=device)
    for row in range(batch):
        eos = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 1, 3)))]
        length = rng.randint(1, 9)
        limit = length + rng.choice((1, 2, 4, 30))
        state.admit(row, prompt[:length], limit, SamplingParams(), SamplingParams(), row, eos)
        if rng.random() < 0.2:
            state.reason[row] = rng.choice([reason for reason in FinishReason if reason])
    state.tree_tokens[:, 1:] = torch.tensor(
        [[rng.randrange(VOCAB_SIZE) for _ in range(tree.num_nodes - 1)] for _ in range(batch)], device=device
    ).view(batch, -1)
    return state


def random_verdict(tree, batch, rng, device):
    stops = [rng.randrange(tree.num_nodes) for _ in range(batch)]
    invalid = [rng.random() < 0.2 for _ in range(batch)]
    return Verdict(
        path=tree.on(device).paths[torch.tensor(stops, device=device)].contiguous(),
        num_accepted=torch.tensor([tree.depths[stop] for stop in stops], device=device),
        next_token=torch.tensor([-1 if bad else rng.randrange(VOCAB_SIZE) for bad in invalid], device=device),
        invalid=torch.tensor(invalid, device=device),
    )


def visible(state):
    """What a state says; beyond lengths and counts anything may stand."""
    tokens, new, report = state.tokens.clone(), state.new_tokens.clone(), state.report.clone()
    for row in range(state.batch_size):
        tokens[row, state.num_tokens[row] :] = 0
        new[row, state.num_new[row] :] = 0
        report[row, 3 + state.num_new[row] :] = 0
    names = ("num_tokens", "max_tokens", "reason", "num_new", "num_drafted", "tree_tokens", "cycles")
    names += ("accepted", "committed")
    said = {name: getattr(state, name) for name in names}
    return said | {"tokens": tokens, "new": new, "report": report, "seen": state.sampling.seen}


def random_cache(batch, tree, rng, device, dtype=torch.bfloat16):
    cache = StaticCache(2, batch, 3, CAPACITY + tree.num_nodes, rng.choice((64, 20)), dtype, device)
    cache.keys.normal_()
    cache.values.normal_()
    return cache


@pytest.mark.parametrize("first", [False, True])
def test_a_report_says_what_was_committed(first):
    rng = random.Random(3)
    for trial in range(60):
        tree = TREES[trial % len(TREES)]
        state = random_state(tree, 4, rng, "cpu")
        before = state.num_tokens.clone()
        verdict = random_verdict(DraftTree.chain(0) if first else tree, 4, rng, "cpu")
        Committer(state, random_cache(4, tree, rng, "cpu"))(verdict, first=first)
        assert torch.equal(state.num_tokens - before, state.num_new)
        for row in range(4):
            count, drafted, reason, *tokens = state.report[row].tolist()
            end = int(state.num_tokens[row])
            assert count == state.num_new[row]
            assert tokens[:count] == state.tokens[row, end - count : end].tolist()
            assert state.new_tokens[row, :count].tolist() == tokens[:count]
            assert drafted == state.num_drafted[row]
            assert reason == state.reason[row]
            assert state.new_tokens[row].min() >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("first", [False, True])
def test_the_kernels_commit_as_the_reference_does(first):
    rng = random.Random(5)
    for trial in range(200):
        tree, batch = TREES[trial % len(TREES)], rng.choice((1, 3, 8))
        state = random_state(tree, batch, rng, "cuda")
        cache = random_cache(batch, tree, rng, "cuda", rng.choice((torch.bfloat16, torch.float32)))
        verdict = random_verdict(DraftTree.chain(0) if first else tree, batch, rng, "cuda")
        other_state, other_cache = copy.deepcopy((state, cache))
        Committer(state, cache, "cuda")(verdict, first=first)
        Committer(other_state, other_cache, "reference")(verdict, first=first)
        ours, expected = visible(state), visible(other_state)
        for name, value in expected.items():
            assert torch.equal(ours[name], value), (trial, name)
        # The reference repeats the last row of a short path; rows beyond the new length are leftovers.
        for row in range(batch):
            kept = slice(0, int((state.num_tokens - state.num_new)[row] + verdict.num_accepted[row]))
            for stored, reference in ((cache.keys, other_cache.keys), (cache.values, other_cache.values)):
                assert torch.equal(stored[:, row, :, kept], reference[:, row, :, kept]), trial
