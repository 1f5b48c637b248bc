"""The draft's sampling: kernels against the reference, and that q is the law drawn from."""

import pytest
import torch
from kernel_cases import LARGE_VOCABULARIES, random_case, raw_draft_logits
from test_verify import INTERPRETED, KERNELS

from fastspec import DraftTree
from fastspec.ops import propose
from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.verification import Rule


def outcome(case, seed, level, backend):
    """Tokens and log-weights after a proposal."""
    tokens, draft_logits = case.tokens.clone(), case.draft_logits.clone()
    raw = raw_draft_logits(case, seed, level, padded=True)
    propose(raw, level, case.tree, tokens, draft_logits, case.sampling, case.positions, case.rule, backend)
    return tokens, draft_logits


def compare(seeds, backend, device, **options):
    for seed in seeds:
        case = random_case(seed, device, **options)
        for level in range(case.tree.max_depth):
            tokens, weights = outcome(case, seed, level, "reference")
            got_tokens, got_weights = outcome(case, seed, level, backend)
            assert torch.equal(tokens, got_tokens), f"{case.description}, level {level}"
            # The law is the same: cut at the same tokens, equal weights elsewhere; -inf - -inf is nan.
            assert torch.equal(weights.isneginf(), got_weights.isneginf()), case.description
            torch.testing.assert_close(weights, got_weights, rtol=1e-5, atol=1e-5, equal_nan=True)


@INTERPRETED
def test_triton_equals_the_reference_when_interpreted(exhaustive):
    sizes = (1, 2, 31, 32, 33, 129)
    compare(range(200 if exhaustive else 12), "triton", "cpu", vocabularies=sizes, max_nodes=6, max_batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("part", range(2))
def test_kernels_equal_the_reference(backend, part):
    compare(range(300 * part, 300 * (part + 1)), backend, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_equal_the_reference_on_large_vocabularies(backend):
    compare(range(3000, 3015), backend, "cuda", vocabularies=LARGE_VOCABULARIES, max_nodes=8, max_batch=2)


def draw_children(count, params, logits, rule=Rule.RECURSIVE_REJECTION, trials=20_000, backend="reference"):
    """Children of the root for many seeds, ``[trials, count]``, and the law they were drawn from."""
    device = logits.device
    tree = DraftTree.kary((count,))
    vocab_size = len(logits)
    sampling = SamplingTensors(trials, vocab_size, device)
    sampling.fill(params)
    sampling.seed[:] = torch.arange(trials, device=device)
    tokens = torch.zeros(trials, tree.num_nodes, dtype=torch.int64, device=device)
    draft_logits = torch.zeros(trials, 1, vocab_size, device=device)
    rows = logits.repeat(trials, 1, 1)
    positions = torch.full((trials,), 5, device=device)
    propose(rows, 0, tree, tokens, draft_logits, sampling, positions, rule, backend)
    return tokens[:, 1:], draft_logits[0, 0].double().softmax(-1)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(top_k=4), SamplingParams(top_p=0.8)],
)
def test_first_children_follow_q_and_siblings_are_drawn_without_replacement(params):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0])
    drawn, q = draw_children(2, params, logits)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    pairs = torch.zeros(6, 6, dtype=torch.float64)
    pairs.index_put_((drawn[:, 0], drawn[:, 1]), torch.ones(len(drawn), dtype=torch.float64), accumulate=True)
    law = q[:, None] * q[None] / (1 - q[:, None])
    law = law.masked_fill(torch.eye(6, dtype=torch.bool), 0.0)
    expected = law * len(drawn)
    assert pairs[law == 0].sum() == 0
    cells = expected > 5
    statistic = ((pairs - expected)[cells] ** 2 / expected[cells]).sum()
    assert statistic < cells.sum() + 10 * (2 * cells.sum()) ** 0.5


def test_children_beyond_the_support_are_absent():
    drawn, q = draw_children(4, SamplingParams(top_k=2), torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0]), trials=50)
    assert (q > 0).tolist() == [True, True, False, False, False]
    assert (drawn[:, 2:] == -1).all()
    assert (drawn[:, :2].sort().values == torch.tensor([0, 1])).all()


def test_without_noise_children_come_by_likelihood_lowest_id_first():
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0, float("-inf")])
    for params, rule in (
        (SamplingParams(temperature=0), Rule.RECURSIVE_REJECTION),
        (SamplingParams(), Rule.TARGET_ONLY),
    ):
        drawn, _ = draw_children(5, params, logits, rule, trials=2)
        assert drawn.tolist() == [[1, 2, 0, 3, -1]] * 2


def test_coupled_noise_depends_on_the_tokens_position_alone():
    """Nodes of one depth share their noise under the drafter-invariant rule, and differ under the others."""
    tree = DraftTree.kary((2, 1))
    logits = torch.randn(1, 1, 50).expand(1, 2, 50).contiguous()
    for rule, same in ((Rule.DRAFTER_INVARIANT, True), (Rule.RECURSIVE_REJECTION, False)):
        agree = []
        for seed in range(20):
            sampling = SamplingTensors(1, 50, "cpu")
            sampling.set(0, SamplingParams(), seed)
            tokens = torch.zeros(1, 5, dtype=torch.int64)
            propose(logits, 1, tree, tokens, torch.zeros(1, 3, 50), sampling, torch.tensor([4]), rule)
            agree.append(bool(tokens[0, 3] == tokens[0, 4]))
        assert all(agree) == same


def test_tensors_that_do_not_fit_are_refused():
    tree, sampling = DraftTree.kary((2, 2)), SamplingTensors(1, 8, "cpu")
    tokens, positions = torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    weights = torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="level must be 0 to 1, got 2"):
        propose(torch.zeros(1, 2, 8), 2, tree, tokens, weights, sampling, positions, Rule.TRAVERSAL)
    with pytest.raises(ValueError, match=r"logits must be \[B=1, R=2, V_draft\] .*, got \[1, 3, 8\] float32"):
        propose(torch.zeros(1, 3, 8), 1, tree, tokens, weights, sampling, positions, Rule.TRAVERSAL)
    # The kernels know where these begin, and nothing of their strides and ends.
    arguments = torch.zeros(2, 2, 8), 1, tree, torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"positions must be contiguous, got strides \(0,\)"):
        propose(*arguments, SamplingTensors(2, 8, "cpu"), positions.expand(2), Rule.TRAVERSAL)
    with pytest.raises(ValueError, match=r"sampling.temperature must be \[B=2\] .*, got \[1\] float64"):
        propose(*arguments, sampling, positions.repeat(2), Rule.TRAVERSAL)
