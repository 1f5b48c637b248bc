"""Kernels against the reference: the same random numbers, the same integers; and what only a GPU can show."""

import dataclasses
import itertools
import types

import pytest
import torch
from kernel_cases import LARGE_VOCABULARIES, VOCABULARIES, random_case

from fastspec import DraftTree
from fastspec.ops import Proposer, Verifier, verify
from fastspec.ops.backends import backends, choose
from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.verification import Rule

INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton is compiled, not interpreted, here"
)
KERNELS = ("cuda", "triton")


def run(case, backend):
    return verify(
        case.target_logits,
        case.tokens,
        case.tree,
        case.sampling,
        case.positions,
        case.rule,
        case.draft_logits,
        backend=backend,
    )


def assert_same(expected, got, description):
    for name, theirs, ours in zip(expected._fields, expected, got, strict=True):
        assert torch.equal(theirs, ours), f"{description}: {name} {theirs.tolist()} != {ours.tolist()}"


def compare(seeds, backend, device, **options):
    for seed in seeds:
        case = random_case(seed, device, **options)
        if case.rule is Rule.TRAVERSAL and not case.tree.is_chain:
            continue
        assert_same(run(case, "reference"), run(case, backend), case.description)


@INTERPRETED
def test_triton_equals_the_reference_when_interpreted(exhaustive):
    sizes = (1, 2, 31, 32, 33, 129)
    compare(range(400 if exhaustive else 30), "triton", "cpu", vocabularies=sizes, max_nodes=8, max_batch=2)


@INTERPRETED
def test_triton_tile_boundaries_when_interpreted():
    compare(range(900, 906), "triton", "cpu", vocabularies=(4095, 4096, 4097), max_nodes=3, max_batch=1)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("part", range(4))
def test_kernels_equal_the_reference(backend, part):
    compare(range(600 * part, 600 * (part + 1)), backend, "cuda", max_nodes=20)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("vocab_size", LARGE_VOCABULARIES)
def test_kernels_equal_the_reference_on_large_vocabularies(backend, vocab_size):
    compare(range(3000, 3012), backend, "cuda", vocabularies=(vocab_size,), max_nodes=8, max_batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("gamma", [1, 5, 14, 15, 16, 31])
def test_short_and_long_chains(backend, gamma):
    """Up to 16 nodes the CUDA kernel has a way of its own, which leaves some laws and sequences to the general one."""
    vocabularies = (33, 2049, 4097, 32064)
    for rule in (Rule.BLOCK, Rule.TOKEN_LEVEL):
        compare(
            range(5000, 5030),
            backend,
            "cuda",
            tree=DraftTree.chain(gamma),
            rule=rule,
            vocabularies=vocabularies,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("rule", "top_k"), [(Rule.BLOCK, 0), (Rule.TOKEN_LEVEL, 0), (Rule.TOKEN_LEVEL, 40)])
def test_where_nothing_is_left_of_a_residual_the_law_itself_is_drawn_from(backend, rule, top_k):
    """A draft that agrees wholly with the target, and a token that neither would draw.

    Not block verification where the masses of p and q are summed over different tokens: they differ in their last
    digits, and of h = 0 / 0 nothing but these is left.
    """
    tree, vocab_size, batch = DraftTree.chain(3), 4097, 4
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(batch, 4, vocab_size, generator=generator) * 3
    tokens = torch.zeros(batch, 4, dtype=torch.int64)
    sampling = SamplingTensors(batch, vocab_size, "cuda")
    for row in range(batch):
        broken = row % 3 + 1
        for node in range(1, 4):
            tokens[row, node] = logits[row, node - 1].argmax()
        tokens[row, broken] = 7
        logits[row, broken - 1, 7] = float("-inf")
        sampling.set(row, SamplingParams(top_k=top_k), 40 + row)
    q = logits[:, :3].clone()
    if top_k:
        q = q.masked_fill(q < q.topk(top_k).values[..., -1:], float("-inf"))
    arguments = (logits.cuda(), tokens.cuda(), tree, sampling, torch.full((batch,), 9).cuda(), rule, q.cuda())
    expected = verify(*arguments, backend="reference")
    assert expected.num_accepted.tolist() == [row % 3 for row in range(batch)]
    assert_same(expected, verify(*arguments, backend=backend), rule.value)


def compare_siblings(seeds, branching, backend, device, vocabularies):
    """Trees that a launch reads at once, with laws that cut nothing."""
    compare(
        seeds,
        backend,
        device,
        tree=DraftTree.kary(branching),
        rule=Rule.RECURSIVE_REJECTION,
        params=(SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=2.0)),
        vocabularies=vocabularies,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("branching", [(3, 2, 1), (8,), (2, 2, 2), (3, 4, 4)], ids=str)
def test_siblings_are_rejected_one_after_the_other(backend, branching):
    compare_siblings(range(6000, 6040), branching, backend, "cuda", (33, 513, 4097, 33281))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_where_nothing_is_left_after_several_siblings(backend):
    """The same over a tree: siblings that neither law would draw, one of them drafted twice."""
    tree, vocab_size, batch = DraftTree.kary((3, 2)), 4097, 3
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(batch, tree.num_nodes, vocab_size, generator=generator) * 3
    tokens = torch.zeros(batch, tree.num_nodes, dtype=torch.int64)
    sampling = SamplingTensors(batch, vocab_size, "cuda")
    impossible = torch.tensor([7, 600, 4096])
    logits[..., impossible] = float("-inf")
    tokens[:, 1:] = impossible.repeat(3)
    tokens[1, 2] = 7
    tokens[2, 1] = logits[2, 0].argmax()  # is accepted, and its children are not
    for row in range(batch):
        sampling.set(row, SamplingParams(), 60 + row)
    q = logits[:, list(tree.inner)].contiguous()
    arguments = (logits.cuda(), tokens.cuda(), tree, sampling, torch.full((batch,), 9).cuda())
    expected, got = (
        verify(*arguments, Rule.RECURSIVE_REJECTION, q.cuda(), backend=one) for one in ("reference", backend)
    )
    assert expected.num_accepted.tolist() == [0, 0, 1]
    assert_same(expected, got, "siblings")


def check_greedy_paths(tree, rule, backend, device, batches, vocab_size=4097):
    """One sequence for each node: the argmax leads there and to no child of it; one in three ends at a broken row."""
    nodes, generator = tree.num_nodes, torch.Generator().manual_seed(tree.num_nodes)
    logits = torch.randn(nodes, nodes, vocab_size, generator=generator)
    drawn = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(nodes)])
    tokens, others = drawn[:, :nodes].contiguous(), drawn[:, nodes]
    broken = torch.arange(nodes) % 3 == 2
    paths = torch.arange(nodes)[:, None].repeat(1, tree.max_depth + 1)
    for end in range(nodes):
        path = tree.path(end)
        paths[end, : len(path)] = torch.tensor(path)
        for parent, child in itertools.pairwise(path):
            logits[end, parent, tokens[end, child]] = 30
        logits[end, end, others[end]] = float("nan") if broken[end] else 30
    draft_logits = logits[:, list(tree.inner)].contiguous()
    expected = (paths, torch.tensor(tree.depths), others.masked_fill(broken, -1), broken)
    for rows in batches:
        sampling = SamplingTensors(len(rows), vocab_size, device)
        for place in range(len(rows)):
            sampling.set(place, SamplingParams(temperature=0), place)
        got = verify(
            logits[rows].to(device),
            tokens[rows].to(device),
            tree,
            sampling,
            torch.full((len(rows),), 9, device=device),
            rule,
            draft_logits[rows].to(device),
            backend=backend,
        )
        for name, wanted, found in zip(got._fields, expected, got, strict=True):
            assert found.tolist() == wanted[rows].tolist(), f"{name} of {list(rows)}"


GREEDY_TREES = (
    DraftTree.chain(0),
    DraftTree.chain(3),
    DraftTree.kary((3, 2, 1)),
    DraftTree.kary((3, 2, 2)),
    DraftTree.kary((33,)),
    DraftTree.kary((3, 4, 4)),
    DraftTree.kary((2, 2, 2, 2, 2)),
)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rule", [Rule.RECURSIVE_REJECTION, Rule.TARGET_ONLY])
@pytest.mark.parametrize("tree", GREEDY_TREES, ids=lambda tree: str(tree.num_nodes))
def test_greedy_paths_to_every_node(backend, rule, tree):
    nodes = range(tree.num_nodes)
    check_greedy_paths(tree, rule, backend, "cuda", [list(nodes), *([node] for node in nodes)])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_greedy_paths_over_a_large_vocabulary(backend):
    """So many tokens that a slice is two tiles, and a lane has four slices of a row."""
    tree = DraftTree.kary((3, 2, 2))
    nodes = range(tree.num_nodes)
    batches = [list(nodes), *([node] for node in nodes)]
    check_greedy_paths(tree, Rule.RECURSIVE_REJECTION, backend, "cuda", batches, vocab_size=66049)


def test_greedy_paths_to_every_node_by_the_reference():
    for tree in GREEDY_TREES[:4]:
        check_greedy_paths(tree, Rule.TARGET_ONLY, "reference", "cpu", [list(range(tree.num_nodes))])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_large_batches_and_trees(backend):
    compare(range(4000, 4010), backend, "cuda", vocabularies=VOCABULARIES[4:], max_nodes=30, max_batch=64)
    for tree in (
        DraftTree.kary((4, 3, 2, 1)),
        DraftTree.chain(127),
        DraftTree(tuple(sorted(range(-1, 127)))),
    ):
        case = random_case(7, "cuda", vocabularies=(2049,))
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(3, tree.num_nodes, 2049, generator=generator).cuda()
        tokens = logits[:, :, :].argmax(-1)[:, tree.on("cuda").parents]
        sampling = SamplingTensors(3, 2049, "cuda")
        for row, params in enumerate(
            (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.8))
        ):
            sampling.set(row, params, row)
        q = logits[:, list(tree.inner)].contiguous()
        big = dataclasses.replace(
            case,
            tree=tree,
            rule=Rule.RECURSIVE_REJECTION,
            target_logits=logits,
            draft_logits=q,
            tokens=tokens,
            sampling=sampling,
            positions=torch.tensor([5, 6, 7], device="cuda"),
            description=str(tree.num_nodes),
        )
        assert_same(run(big, "reference"), run(big, backend), big.description)


def check_zeros_of_both_signs(backend, device):
    batch, row = 64, (2.0, 2.0, 0.0, *[-0.0] * 5)
    tree, sampling = DraftTree.chain(1), SamplingTensors(batch, len(row), "cpu")
    for index in range(batch):
        sampling.set(index, SamplingParams(top_k=3, top_p=0.9), index)
    logits = torch.tensor(row, device=device).expand(batch, 2, -1).contiguous()
    inputs = (
        logits,
        torch.full((batch, 2), -1, device=device),
        tree,
        sampling.to(device),
        torch.arange(batch, device=device),
        Rule.TARGET_ONLY,
    )
    expected = verify(*inputs, backend="reference")
    assert (expected.next_token > 2).any()  # the third largest logit is a zero, and so are five more
    assert_same(expected, verify(*inputs, backend=backend), "zeros")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_zeros_of_both_signs_are_ties(backend):
    check_zeros_of_both_signs(backend, "cuda")


@INTERPRETED
def test_zeros_of_both_signs_are_ties_when_interpreted():
    check_zeros_of_both_signs("triton", "cpu")


def poisoned_copy(case):
    """The same case with rows that lie further apart, NaN between them, and absurd tokens beyond the tree."""
    batch, nodes, vocab_size = case.target_logits.shape
    wide = torch.full(
        (batch, nodes, vocab_size + 40),
        float("nan"),
        dtype=case.target_logits.dtype,
        device=case.target_logits.device,
    )
    wide[..., :vocab_size] = case.target_logits
    tokens = torch.full((batch, nodes + 5), 2**40, device=case.tokens.device)
    tokens[:, :nodes] = case.tokens
    return dataclasses.replace(case, target_logits=wide[..., :vocab_size], tokens=tokens[:, :nodes])


@INTERPRETED
def test_triton_reads_nothing_beyond_the_valid_sizes_when_interpreted():
    for seed in range(100, 106):
        case = random_case(seed, vocabularies=(31, 33), max_nodes=6, max_batch=2)
        assert_same(run(case, "triton"), run(poisoned_copy(case), "triton"), case.description)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_read_nothing_beyond_the_valid_sizes(backend):
    for seed in range(100, 160):
        case = random_case(seed, "cuda")
        if case.rule is not Rule.TRAVERSAL:
            assert_same(run(case, backend), run(poisoned_copy(case), backend), case.description)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_broken_sequence_leaves_the_others_alone(backend):
    case = random_case(12, "cuda", vocabularies=(2049,), max_batch=3)
    tree, vocab_size = DraftTree.kary((2, 2)), 2049
    logits = torch.randn(3, tree.num_nodes, vocab_size, device="cuda")
    sampling = SamplingTensors(3, vocab_size, "cuda")
    tokens = torch.randint(vocab_size, (3, tree.num_nodes), device="cuda")
    q = torch.randn(3, len(tree.inner), vocab_size, device="cuda")
    verifier = Verifier(tree, 3, vocab_size, Rule.RECURSIVE_REJECTION, "cuda", backend)
    clean = [one.clone() for one in verifier(logits, tokens, sampling, case.positions[:1].repeat(3), q)]
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = logits.clone()
        broken[1] = value
        got = verifier(broken, tokens, sampling, case.positions[:1].repeat(3), q)
        assert got.invalid.tolist() == [False, True, False]
        assert got.next_token[1] == -1
        for theirs, ours in zip(clean, got, strict=True):
            assert torch.equal(theirs[[0, 2]], ours[[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_thousand_runs_agree(backend):
    for params in (SamplingParams(), SamplingParams(temperature=0.8, top_k=50, top_p=0.9)):
        tree, vocab_size = DraftTree.chain(5), 32064
        generator = torch.Generator().manual_seed(5)
        logits = (torch.randn(2, 6, vocab_size, generator=generator) * 2).cuda()
        q = (logits[:, :5] + 0.5 * torch.randn(2, 5, vocab_size, generator=generator).cuda()).contiguous()
        tokens = torch.cat([torch.zeros(2, 1, dtype=torch.int64).cuda(), q.argmax(-1)], dim=1)
        sampling = SamplingTensors(2, vocab_size, "cuda")
        for row in range(2):
            sampling.set(row, params, 77 + row)
        verifier = Verifier(tree, 2, vocab_size, Rule.BLOCK, "cuda", backend)
        positions = torch.tensor([640, 11], device="cuda")
        first = [one.clone() for one in verifier(logits, tokens, sampling, positions, q)]
        for _ in range(1000):
            again = verifier(logits, tokens, sampling, positions, q)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("width", [4, 16, 60, 400])
def test_likely_tokens_side_by_side(backend, width):
    """Parts of the vocabulary report some of their largest logits only; here most of the likely ones are in one."""
    tree, vocab_size, batch = DraftTree.chain(3), 32064, 8
    generator = torch.Generator().manual_seed(width)
    sampling = SamplingTensors(batch, vocab_size, "cuda")
    verifier = Verifier(tree, batch, vocab_size, Rule.TOKEN_LEVEL, "cuda", backend)
    positions = torch.full((batch,), 50, device="cuda")
    for trial in range(6):
        logits = torch.randn(batch, tree.num_nodes, vocab_size, generator=generator) * 2
        first = 15 * 512 + 128 + 37 * trial
        logits[..., first : first + width] += 6 + 2 * torch.rand(batch, 4, 1, generator=generator)
        q = (logits[:, :3] + 0.5 * torch.randn(batch, 3, vocab_size, generator=generator)).cuda()
        tokens = torch.cat([torch.zeros(batch, 1).long().cuda(), q.argmax(-1)], dim=1)
        for row in range(batch):
            top_p = 0.1 + 0.8 * float(torch.rand(1, generator=generator))
            params = SamplingParams(top_k=(50, 0, 20, 3)[row % 4], top_p=top_p, temperature=1.0 + row % 3)
            sampling.set(row, params, 100 * trial + row)
        arguments = (logits.cuda(), tokens, sampling, positions, q)
        expected = verify(*arguments[:2], tree, *arguments[2:4], Rule.TOKEN_LEVEL, q, backend="reference")
        assert_same(expected, verifier(*arguments), f"trial {trial}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("vocab_size", [4097, 32064, 128256])
def test_thresholds_among_the_largest_logits(backend, vocab_size):
    """Sizes of k around those at which the search among the listed logits changes, with ties and without."""
    laws = [{"top_k": k, "top_p": 0.9} for k in (1, 32, 50, 72, 73, 128, 129, 400)]
    laws += [{"min_p": p} for p in (0.001, 0.05, 1.0)] + [
        {"top_p": p, "min_p": 0.02} for p in (0.3, 0.95, 0.999)
    ]
    laws += [{"top_p": 0.6}, {"top_k": 60}]
    tree, batch = DraftTree.chain(3), len(laws)
    sampling = SamplingTensors(batch, vocab_size, "cuda")
    verifier = Verifier(tree, batch, vocab_size, Rule.TOKEN_LEVEL, "cuda", backend)
    positions = torch.full((batch,), 50, device="cuda")
    for trial in range(4):
        generator = torch.Generator().manual_seed(trial)
        logits = torch.randn(batch, tree.num_nodes, vocab_size, generator=generator) * 2.5
        if trial % 2:
            logits = (logits * 8).round() / 8
        q = (logits[:, :3] + 0.3 * torch.randn(batch, 3, vocab_size, generator=generator)).cuda()
        tokens = torch.cat([torch.zeros(batch, 1).long().cuda(), q.argmax(-1)], dim=1)
        for row, law in enumerate(laws):
            sampling.set(row, SamplingParams(temperature=0.6 + 0.3 * trial, **law), 100 * trial + row)
        arguments = (logits.cuda(), tokens, sampling, positions, q)
        expected = verify(*arguments[:2], tree, *arguments[2:4], Rule.TOKEN_LEVEL, q, backend="reference")
        assert_same(expected, verifier(*arguments), f"trial {trial}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rule", [Rule.BLOCK, Rule.TARGET_ONLY, Rule.DRAFTER_INVARIANT])
def test_one_logit_that_is_no_number_ends_the_sequence(backend, rule):
    tree, vocab_size = DraftTree.chain(2), 2049
    logits = torch.randn(3, 3, vocab_size, device="cuda")
    q = logits[:, :2].contiguous()
    sampling = SamplingTensors(3, vocab_size, "cuda")
    positions = torch.full((3,), 9, device="cuda")
    verifier = Verifier(tree, 3, vocab_size, rule, "cuda", backend)
    # Drafted tokens that are accepted, or none: the rows that are drawn from are the last, and the first.
    for tokens, node in ((torch.zeros(3, 3).long(), 2), (torch.full((3, 3), -1), 0)):
        tokens = tokens.cuda()
        likely = logits.clone()
        likely[:, :2, 0] = 90.0
        law = likely[:, :2].contiguous() if rule is Rule.BLOCK else q
        likely[1, node, 1234] = float("nan")
        verdict = verifier(likely, tokens, sampling, positions, law)
        assert verdict.invalid.tolist() == [False, True, False]
        assert verdict.next_token[1] == -1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("temperature", [1e-9, 1e-8, 1e-4])
def test_the_lowest_temperatures(backend, temperature):
    tree, vocab_size = DraftTree.chain(2), 2049
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(2, 3, vocab_size, generator=generator) * 9).cuda()
    q = logits[:, :2].contiguous()
    tokens = torch.cat([torch.zeros(2, 1).long().cuda(), q.argmax(-1)], dim=1)
    sampling = SamplingTensors(2, vocab_size, "cuda")
    for row, top_p in enumerate((1.0, 0.9)):
        sampling.set(row, SamplingParams(temperature=temperature, top_p=top_p), row)
    positions = torch.full((2,), 9, device="cuda")
    got = verify(logits, tokens, tree, sampling, positions, Rule.BLOCK, q, backend=backend)
    assert got.next_token.tolist() == logits[:, 2].argmax(-1).tolist()
    assert got.num_accepted.tolist() == [2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tree", "rule"),
    [(DraftTree.kary((3, 2, 1)), Rule.RECURSIVE_REJECTION), (DraftTree.chain(5), Rule.BLOCK)],
    ids=["tree", "chain"],
)
def test_results_do_not_depend_on_the_launch_shape(tree, rule):
    """Blocks with one slice of the vocabulary or many: the same bits."""
    vocab_size = 32064
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(4, tree.num_nodes, vocab_size, generator=generator) * 2).cuda()
    q = (
        logits[:, list(tree.inner)] + torch.randn(4, len(tree.inner), vocab_size, generator=generator).cuda()
    ).contiguous()
    tokens = torch.randint(vocab_size, (4, tree.num_nodes), generator=generator).cuda()
    for node in range(1, tree.num_nodes):
        parent = tree.inner_index[tree.parents[node]]
        rank = tree.children[tree.parents[node]].index(node)
        tokens[:, node] = q[:, parent].topk(3).indices[:, rank]
    sampling = SamplingTensors(4, vocab_size, "cuda")
    kinds = (
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=0),
        SamplingParams(top_k=9),
    )
    for row, params in enumerate(kinds):
        sampling.set(row, params, row)
    positions = torch.tensor([9, 8, 7, 6], device="cuda")

    def outcome(group_size):
        verifier = Verifier(tree, 4, vocab_size, rule, "cuda", "cuda")
        verifier._group_size = group_size
        return [one.tolist() for one in verifier(logits, tokens, sampling, positions, q)]

    expected = outcome(1)
    for group_size in (2, 7, 16, 33):
        assert outcome(group_size) == expected, group_size


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_a_captured_graph_follows_its_inputs(backend):
    """No memset between replays, no host: new logits, seeds and parameters in the same buffers."""
    tree, vocab_size = DraftTree.chain(4), 2049
    generator = torch.Generator().manual_seed(3)
    sampling = SamplingTensors(2, vocab_size, "cuda")
    logits = torch.zeros(2, 5, vocab_size, device="cuda")
    q = torch.zeros(2, 4, vocab_size, device="cuda")
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    positions = torch.zeros(2, dtype=torch.int64, device="cuda")
    verifier = Verifier(tree, 2, vocab_size, Rule.BLOCK, "cuda", backend)
    verifier(logits, tokens, sampling, positions, q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        verdict = verifier(logits, tokens, sampling, positions, q)
    laws = (
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_k=5),
        SamplingParams(temperature=50.0, top_p=0.95),
        SamplingParams(repetition_penalty=1.3),
    )
    for step in range(50):
        logits.copy_(torch.randn(logits.shape, generator=generator) * 3)
        q.copy_(logits[:, :4].cpu() + torch.randn(q.shape, generator=generator))
        tokens.copy_(torch.cat([torch.zeros(2, 1, dtype=torch.int64), q.argmax(-1).cpu()], dim=1))
        positions.fill_(step)
        for row in range(2):
            sampling.set(row, laws[(step + row) % len(laws)], step * 10 + row)
        graph.replay()
        expected = verify(logits, tokens, tree, sampling, positions, Rule.BLOCK, q, backend="reference")
        assert_same(expected, verdict, f"replay {step}")


def test_tensors_that_do_not_fit_are_refused():
    tree = DraftTree.chain(2)
    logits, q = torch.zeros(2, 3, 8), torch.zeros(2, 2, 8)
    tokens, positions = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    sampling = SamplingTensors(2, 8, "cpu")
    verifier = Verifier(tree, 2, 8, Rule.BLOCK, "cpu")

    def refused(message, error=ValueError, **changes):
        arguments = {
            "target_logits": logits,
            "tokens": tokens,
            "sampling": sampling,
            "positions": positions,
            "draft_logits": q,
            **changes,
        }
        with pytest.raises(error, match=message):
            verifier(**arguments)

    refused(
        r"target_logits must be \[B=2, N=3, V=8\] .* on cpu, got \[2, 4, 8\] float32",
        target_logits=torch.zeros(2, 4, 8),
    )
    refused(r"tokens must be \[B=2, N=3\] int64 on cpu, got \[2, 3\] int32", tokens=tokens.int())
    refused(r"positions must be \[B=2\] int64 on cpu, got \[1\] int64", positions=positions[:1])
    # The kernels know where these begin, and nothing of their strides and ends.
    refused(r"positions must be contiguous, got strides \(2,\)", positions=torch.arange(4)[::2])
    refused(r"positions must be contiguous, got strides \(0,\)", positions=positions[:1].expand(2))
    refused(
        r"sampling.temperature must be \[B=2\] float64 on cpu, got \[1\]",
        sampling=SamplingTensors(1, 8, "cpu"),
    )
    refused(
        r"sampling.seen must be \[B=2, V=8\] bool on cpu, got \[2, 7\]", sampling=SamplingTensors(2, 7, "cpu")
    )
    refused(
        r"sampling.temperature must be .* on cpu, got \[2\] float64 on meta",
        sampling=SamplingTensors(2, 8, "meta"),
    )
    refused("rule 'block' needs draft_logits, got None", draft_logits=None)
    refused(r"draft_logits must be \[B=2, N_inner=2, V=8\] float32", draft_logits=q.to(torch.bfloat16))
    refused("target_logits must have contiguous rows", target_logits=torch.zeros(3, 2, 8).transpose(0, 1))
    refused("target_logits must be a tensor, got list", TypeError, target_logits=[1])


@pytest.mark.parametrize("operation", [Verifier, Proposer])
def test_nothing_to_decide_is_refused(operation):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        operation(DraftTree.chain(2), 0, 8, Rule.BLOCK, "cpu")
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        operation(DraftTree.chain(2), 1, 0, Rule.BLOCK, "cpu")


def test_choice_of_backend(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    assert choose("auto", cpu, True) == "reference"
    assert choose("reference", cpu, False) == "reference"
    with pytest.raises(ValueError, match="backend must be one of auto, reference, triton, cuda, got 'rocm'"):
        choose("rocm", cpu, True)
    with pytest.raises(ValueError, match="backend 'cuda' does not know this case; use 'reference'"):
        choose("cuda", cpu, False)
    names = [backend.name for backend in backends()]
    assert names == ["cuda", "triton", "reference"]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="backend 'cuda' cannot run here: "):
            choose("cuda", cpu, True)
        monkeypatch.setenv("FASTSPEC_BACKEND", "cuda")
        with pytest.raises(ValueError, match="backend 'cuda' cannot run here: "):
            choose("auto", cpu, True)
    monkeypatch.setenv("FASTSPEC_BACKEND", "reference")
    assert choose("auto", torch.device("cuda"), True) == "reference"


def test_the_backend_fits_the_gpu_that_holds_the_tensors(monkeypatch):
    """Not the current one: a host may have GPUs of several kinds."""
    module = types.SimpleNamespace(architectures="80;90a", cuda_version=13000)
    capabilities = {0: (9, 0), 1: (7, 5), None: (9, 0)}

    def capability(device=None):
        return capabilities[None if device is None else device.index]

    monkeypatch.setattr("fastspec.ops.backends.extension", lambda: module)
    monkeypatch.setattr("fastspec.ops.backends.triton_version", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    assert choose("auto", torch.device("cuda:0"), True) == "cuda"
    assert choose("auto", torch.device("cuda:1"), True) == "reference"
    with pytest.raises(ValueError, match=r"built for 80;90a, but the GPU is of architecture 75"):
        choose("cuda", torch.device("cuda:1"), True)
    with pytest.raises(ValueError, match="backend 'cuda' needs tensors on a GPU, got cpu"):
        choose("cuda", torch.device("cpu"), True)
