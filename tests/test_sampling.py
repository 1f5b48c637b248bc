import itertools

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastspec import DraftTree
from fastspec.sampling import SamplingParams, SamplingTensors, valid_rows


def sampling_tensors(params, vocab_size, seed=0, eos=()):
    tensors = SamplingTensors(len(params), vocab_size, "cpu")
    for row, one in enumerate(params):
        tensors.set(row, one, seed + row, eos)
    return tensors


GRID = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 500), (1.0, 0.9, 0.2), (0.0, 0.1, 1.0))
]


@pytest.mark.parametrize("vocab_size", [2, 31, 1000])
def test_warping_is_that_of_transformers(vocab_size):
    logits = torch.randn(len(GRID), 1, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    ours = sampling_tensors(GRID, vocab_size).warp(logits.double()).softmax(-1)[:, 0]
    for row, params in enumerate(GRID):
        processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
        if params.top_k:
            processors.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            processors.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            processors.append(MinPLogitsWarper(params.min_p))
        theirs = processors(torch.zeros(1, 1, dtype=torch.int64), logits[row].double()).softmax(-1)[0]
        assert torch.equal(ours[row] > 0, theirs > 0), params
        torch.testing.assert_close(ours[row], theirs, rtol=1e-6, atol=1e-9)


def test_penalties_use_each_nodes_own_prefix():
    """Repetition penalty and minimum length at tree nodes equal transformers' on that node's prefix."""
    vocab_size, eos = 16, (5, 9)
    tree = DraftTree.kary((2, 1, 1))
    generator = torch.Generator().manual_seed(2)
    prompt = torch.tensor([1, 4, 4, 7])
    params = SamplingParams(repetition_penalty=1.7, min_tokens=len(prompt) + 3)
    tensors = sampling_tensors([params], vocab_size, eos=eos)
    tensors.seen[0, prompt] = True
    tokens = torch.randint(vocab_size, (1, tree.num_nodes), generator=generator)
    tokens[0, 0] = prompt[-1]
    logits = torch.randn(1, tree.num_nodes, vocab_size, generator=generator) * 2
    nodes = torch.arange(tree.num_nodes)
    ours = tensors.penalise(logits, tree, nodes, tokens, torch.tensor([len(prompt)]))
    for node in range(tree.num_nodes):
        prefix = torch.cat([prompt, tokens[0, list(tree.path(node)[1:])]])[None]
        processors = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.7),
                MinNewTokensLengthLogitsProcessor(len(prompt), 3, list(eos)),
            ]
        )
        theirs = processors(prefix, logits[:, node])
        assert torch.equal(ours[:, node], theirs.double())


def test_what_ties_after_the_penalty_in_single_precision_ties():
    """0.041015625 / 0.7 is 0.05859375 in single precision, in double it is another number."""
    tensors = sampling_tensors([SamplingParams(repetition_penalty=0.7, top_k=1)], 3)
    tensors.seen[0, 2] = True
    logits = torch.tensor([[[0.05859375, -1.0, 0.041015625]]], dtype=torch.bfloat16)
    root = torch.zeros(1, dtype=torch.int64)
    scores = tensors.penalise(
        logits, DraftTree.chain(1), root, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1])
    )
    assert (tensors.warp(scores)[0, 0] > float("-inf")).tolist() == [True, False, True]


def test_ties_are_kept_or_cut_together():
    logits = torch.tensor([[[2.0, 1.0, 1.0, 1.0, 0.0]]]).double()
    kept = sampling_tensors([SamplingParams(top_k=2)], 5).warp(logits)[0, 0] > float("-inf")
    assert kept.tolist() == [True, True, True, True, False]
    kept = sampling_tensors([SamplingParams(top_p=0.6)], 5).warp(logits)[0, 0] > float("-inf")
    assert kept.tolist() == [True, True, True, True, False]
    kept = sampling_tensors([SamplingParams(top_p=0.2)], 5).warp(logits)[0, 0] > float("-inf")
    assert kept.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e20, 1e30])
def test_no_temperature_makes_ties(temperature):
    """Divided by a large one, logits lie closer together than weights near 1 can tell."""
    logits = torch.tensor([[[2.0, 1.0, 0.5, 3.0, 1.0]]]).double()
    for top_k, expected in ((1, [3]), (2, [0, 3]), (3, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        law = sampling_tensors([SamplingParams(temperature=temperature, top_k=top_k)], 5).warp(logits)[0, 0]
        kept = (law > float("-inf")).nonzero()[:, 0].tolist()
        assert kept == (expected if temperature >= 1 else [3])
    law = sampling_tensors([SamplingParams(temperature=temperature, top_p=0.0)], 5).warp(logits)[0, 0]
    assert (law > float("-inf")).nonzero()[:, 0].tolist() == [3]


def test_temperature_zero_takes_the_lowest_id_among_ties():
    law = sampling_tensors([SamplingParams(temperature=0)], 4).warp(
        torch.tensor([[[0.0, 3.0, 3.0, 1.0]]]).double()
    )
    assert law.softmax(-1).tolist() == [[[0, 1, 0, 0]]]


def test_parameters_are_per_sequence():
    logits = torch.randn(1, 1, 20, dtype=torch.float64).expand(3, -1, -1)
    params = [SamplingParams(temperature=0), SamplingParams(top_k=3), SamplingParams()]
    together = sampling_tensors(params, 20).warp(logits)
    for row, one in enumerate(params):
        assert torch.equal(together[row], sampling_tensors([one], 20).warp(logits[:1])[0])
    assert [(row > float("-inf")).sum().item() for row in together] == [1, 3, 20]


def test_valid_rows():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, 1.0], [-inf, 1.0], [nan, 1.0], [inf, 1.0], [-inf, -inf]])
    assert valid_rows(rows).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"temperature": -1},
            "temperature must be a finite number of at least 0 in single precision, got -1",
        ),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -2}, "top_k must be an integer of at least 0, got -2"),
        (
            {"temperature": 1e39},
            "temperature must be a finite number of at least 0 in single precision, got 1e",
        ),
        (
            {"temperature": 1e-46},
            "temperature must be a finite number of at least 0 in single precision, got 1e-46",
        ),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"top_k": float("inf")}, "top_k must be an integer of at least 0, got inf"),
        ({"top_k": 2**63}, "top_k must be an integer of at least 0, got 9"),
        ({"top_p": 1.1}, r"top_p must be in \[0, 1\], got 1.1"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty must be a positive number in single precision, got 0",
        ),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be a positive number in single precision"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty must be a positive number in single precision"),
        ({"min_tokens": -1}, "min_tokens must be an integer of at least 0"),
        ({"min_tokens": 2.5}, "min_tokens must be an integer of at least 0"),
        ({"min_tokens": float("inf")}, "min_tokens must be an integer of at least 0, got inf"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**arguments)


def test_too_many_ends_are_refused():
    with pytest.raises(ValueError, match="at most 16 eos_token_ids are supported, got 17"):
        sampling_tensors([SamplingParams()], 32, eos=tuple(range(17)))
