"""Which chain or tree to draft: the best by exhaustive search, and what earlier calls teach."""

import gc
import itertools

import pytest
import torch
from models import noisy_clone, picture_inputs, tiny_llama, tiny_llava

import fastspec
from fastspec import DraftTree, SpeculativeDecoder, choose_tree
from fastspec.decoder import Request
from fastspec.generation import make_prompts
from fastspec.sampling import SamplingParams
from fastspec.shape import GammaHistory, choose_gamma, measure_acceptance, measure_pass_costs


def expected_tokens(tree, acceptance):
    total = 0.0
    for node in range(tree.num_nodes):
        worth, path = 1.0, tree.path(node)
        for depth, (parent, child) in enumerate(itertools.pairwise(path)):
            rank = tree.children[parent].index(child)
            if depth >= len(acceptance) or rank >= len(acceptance[depth]):
                return -1.0
            worth *= acceptance[depth][rank]
        total += worth
    return total


def all_trees(size):
    """Every tree of so many nodes, as parents in level order."""
    for parents in itertools.product(*(range(node) for node in range(1, size))):
        if all(later >= earlier for earlier, later in itertools.pairwise(parents)):
            yield DraftTree((-1, *parents))


@pytest.mark.parametrize("draft_cost", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("slope", [0.0, 0.05])
@pytest.mark.parametrize(
    "acceptance",
    [
        [[0.6, 0.2, 0.1], [0.5, 0.3], [0.4, 0.3, 0.1]],
        [[0.9, 0.05], [0.9, 0.05], [0.9], [0.9]],
        [[0.3, 0.3, 0.3]],
        [[0.0, 0.0], [0.5]],
    ],
)
def test_no_tree_promises_more(acceptance, slope, draft_cost):
    costs = {size: 1 + slope * size for size in range(1, 8)}

    def rate(tree):
        return expected_tokens(tree, acceptance) / (costs[tree.num_nodes] + draft_cost * tree.max_depth)

    chosen = choose_tree(acceptance, costs, draft_cost, max_nodes=7)
    best = max(rate(tree) for size in range(2, 8) for tree in all_trees(size))
    assert rate(chosen) == pytest.approx(best)


def test_costs_between_sizes_are_those_of_the_larger():
    flat = choose_tree([[0.5, 0.4, 0.05]], {4: 1.0}, 0.1, max_nodes=4)
    assert flat.num_nodes == 4
    stepped = choose_tree([[0.5, 0.4, 0.05]], {3: 1.0, 4: 2.0}, 0.1, max_nodes=4)
    assert stepped.num_nodes == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], {8: 1.0}, 1.0, 8), "at least one child at each depth"),
        (([[]], {8: 1.0}, 1.0, 8), "at least one child at each depth"),
        (([[1.2]], {8: 1.0}, 1.0, 8), "must be probabilities"),
        (([[0.5]], {8: 1.0}, 1.0, 1), "max_nodes must be 2 to 128, got 1"),
        (([[0.5]], {8: 0.0}, 1.0, 8), "costs must be positive"),
        (([[0.5]], {4: 1.0}, 1.0, 8), r"must reach max_nodes=8, got sizes \[4\]"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_tree(*arguments)


def test_gamma_grows_with_acceptance_and_falls_with_cost():
    assert choose_gamma([0.0], 0.1) == 1
    assert choose_gamma([0.99], 0.001) == 16
    lengths = [choose_gamma([rate], 0.05) for rate in (0.2, 0.5, 0.7, 0.9)]
    assert lengths == sorted(set(lengths))
    assert choose_gamma([0.8], 0.3) < choose_gamma([0.8], 0.01)
    assert choose_gamma([0.9, 0.9, 0.0], 0.01) == 2
    best = choose_gamma([0.7], 0.05)
    assert choose_gamma([0.7], 0.05, present=best + 1) == best + 1  # hardly worse
    assert choose_gamma([0.7], 0.05, present=16) == best
    with pytest.raises(ValueError, match="at least one position"):
        choose_gamma([], 0.1)


def test_acceptance_is_counted_by_depth_and_rank():
    target = tiny_llava()
    inputs = picture_inputs(2)
    prompts = make_prompts(target, inputs["input_ids"], [0, 0], inputs)
    tree = DraftTree.kary((2, 1))
    greedy = SamplingParams(temperature=0.0)
    requests = [Request(prompt, 12, greedy) for prompt in prompts]
    itself = SpeculativeDecoder(target, noisy_clone(target, noise=0.0), tree=tree)
    assert measure_acceptance(itself, requests) == [[1.0, 0.0], [1.0]]
    other = measure_acceptance(SpeculativeDecoder(target, tiny_llama(), tree=tree), requests)
    assert [len(ranks) for ranks in other] == [2, 1]
    assert all(0 <= value <= 1 for ranks in other for value in ranks)
    assert sum(other[0]) < 1


def test_passes_are_timed():
    decoder = SpeculativeDecoder(tiny_llava(), tiny_llama(), gamma=2)
    costs = measure_pass_costs(decoder.target, (1, 8), context=16, repeats=2)
    assert list(costs) == [1, 8]
    assert all(0 < cost < 10 for cost in costs.values())


def test_auto_learns_from_earlier_calls():
    fastspec.clear_decoders()
    target = tiny_llava()
    good, poor = noisy_clone(target, noise=0.0), tiny_llama()
    greedy = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    greedy["eos_token_id"] = None
    expected = target.generate(**picture_inputs(), **{**greedy, "return_dict_in_generate": False})

    def lengths(draft):
        found = []
        for _ in range(3):
            output = fastspec.generate(target, draft=draft, gamma="auto", **picture_inputs(), **greedy)
            assert torch.equal(output.sequences, expected)
            found.append(output.speculation.draft_passes)
        return found

    first, *later = lengths(poor)
    assert first == 5
    assert later[-1] < 5
    assert lengths(good)[0] == 5  # each pair by itself
    with pytest.raises(ValueError, match="gamma or tree, not both"):
        fastspec.generate(target, draft=poor, gamma="auto", tree=DraftTree.chain(2), **picture_inputs())
    with pytest.raises(ValueError, match="gamma must be an integer from 1 to 127, got 'long'"):
        fastspec.generate(target, draft=poor, gamma="long", **picture_inputs())


def test_history_keeps_no_model_alive():
    history = GammaHistory()
    target, draft = tiny_llava(), tiny_llama()
    record = fastspec.generate(
        target, draft=draft, **picture_inputs(), max_new_tokens=5, return_dict_in_generate=True
    ).speculation
    history.add(target, draft, record)
    assert len(history._pairs[target]) == 1
    fastspec.clear_decoders()
    del draft
    gc.collect()
    assert len(history._pairs[target]) == 0
    del target
    gc.collect()
    assert len(history._pairs) == 0
