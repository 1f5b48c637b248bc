"""The pass in one launch: as exact as the same layers in PyTorch, and the same bits for a token however it came."""

import copy

import pytest
import torch
from models import LAYER_OF_7B, random_causal_lm, tiny_llama
from transformers import LlamaConfig, Qwen2Config

from fastspec import DraftTree
from fastspec.model.cache import CacheView, StaticCache
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack
from fastspec.ops.fused_pass import FusedPass, unsupported, visible_slots

DEVICE = "cuda"
SMALL = {
    "vocab_size": 1003,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
CONFIGS = {
    "grouped heads": lambda: LlamaConfig(**SMALL),
    "multi-head": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4, "vocab_size": 1000}),
    "one key head": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 1, "head_dim": 128}),
    "odd sizes, llama3 rope": lambda: LlamaConfig(
        **{**SMALL, "hidden_size": 320, "intermediate_size": 704, "head_dim": 128}, rope_parameters=LLAMA3
    ),
    "qwen2": lambda: Qwen2Config(**{key: value for key, value in SMALL.items() if key != "head_dim"}),
}
DTYPES = (torch.bfloat16, torch.float16)


def random_cache(transformer, prefixes, num_rows, seed=0, capacity=None):
    """A cache with random rows below the prefixes and NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    cache = transformer.new_cache(len(prefixes), capacity or max(prefixes) + num_rows + 3)
    for stored in (cache.keys, cache.values):
        stored.fill_(float("nan"))
        for sequence, prefix in enumerate(prefixes):
            rows = stored[:, sequence, :, :prefix]
            rows.copy_(torch.randn(rows.shape, generator=generator))
    return cache


def clone(cache, dtype=None):
    """A copy of a cache, perhaps in another element type."""
    copied = StaticCache(*cache.keys.shape, dtype or cache.keys.dtype, cache.keys.device)
    copied.keys.copy_(cache.keys)
    copied.values.copy_(cache.values)
    return copied


def run_layers(transformer, cache, ids, prefix, tree):
    """Logits by the transformer's own layers."""
    tables = tree.on(ids.device)
    hidden = transformer.forward(
        transformer.embed(ids), prefix[:, None] + tables.depths, cache, CacheView(prefix, tables.mask)
    )
    return transformer.logits(hidden)


def compare(transformer, exact, tree, prefixes, seed=0, capacity=None):
    """One pass against the layers in float64: the error, the cache rows written, the others untouched."""
    rows = tree.num_nodes
    cache = random_cache(transformer, prefixes, rows, seed, capacity)
    plain, reference, before = clone(cache), clone(cache, torch.float64), clone(cache)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(transformer.vocab_size, (len(prefixes), rows), generator=generator).to(DEVICE)
    prefix = torch.tensor(prefixes, device=DEVICE)
    expected = run_layers(exact, reference, ids, prefix, tree)
    usual = run_layers(transformer, plain, ids, prefix, tree).double()
    got = FusedPass(transformer, cache, rows, tree.on(DEVICE).mask)(ids, prefix).double()
    place = f"prefixes {prefixes}, {rows} rows"
    error, usual_error = ((logits - expected).abs().max().item() for logits in (got, usual))
    assert error <= 2 * usual_error + 1e-3, f"{place}: {error} against {usual_error}"
    for name in ("keys", "values"):
        new, old, usual, exact_rows = (getattr(one, name) for one in (cache, before, plain, reference))
        for sequence, start in enumerate(prefixes):
            written = slice(start, start + rows)
            usual_error, error = (
                (one[:, sequence, :, written].double() - exact_rows[:, sequence, :, written])
                .abs()
                .max()
                .item()
                for one in (usual, new)
            )
            assert error <= 2 * usual_error + 1e-3, f"{place}: {name}"
            old[:, sequence, :, written] = new[:, sequence, :, written]
        assert torch.equal(new.view(torch.int16), old.view(torch.int16)), f"{place}: {name} elsewhere"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits_and_cache_are_as_exact_as_pytorchs(name, dtype, exhaustive):
    model = random_causal_lm(CONFIGS[name](), dtype, DEVICE)
    exact = DecodeTransformer(*text_stack(copy.deepcopy(model).double()))
    transformer = DecodeTransformer(*text_stack(model))
    for prefix in (0, 1, 15, 16, 17, 31, 33, 700):
        for gamma in (0, 5):
            compare(transformer, exact, DraftTree.chain(gamma), [prefix], seed=prefix)
    compare(transformer, exact, DraftTree.chain(5), [90], capacity=96)
    for tree in (
        DraftTree.kary((3, 2, 1)),
        DraftTree.chain(16),
        DraftTree.kary((3, 3, 2, 1)),
        DraftTree.kary((3, 3, 4, 1)),
    ):
        compare(transformer, exact, tree, [100], seed=tree.num_nodes)
    compare(transformer, exact, DraftTree.chain(12), [40, 3, 100])
    compare(transformer, exact, DraftTree.chain(4), [0, 15, 16, 17, 31, 33, 700, 5])
    compare(transformer, exact, DraftTree.kary((3, 2)), [0, 70, 16, 17, 31, 33, 700, 5])
    if exhaustive:
        for seed in range(200):
            generator = torch.Generator().manual_seed(seed)
            batch = int(torch.randint(1, 9, (), generator=generator))
            gamma = int(torch.randint(0, min(17, 128 // batch), (), generator=generator))
            prefixes = torch.randint(0, 200, (batch,), generator=generator).tolist()
            compare(transformer, exact, DraftTree.chain(gamma), prefixes, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_layer_of_the_7b_is_as_exact_as_pytorchs(dtype):
    model = random_causal_lm(LlamaConfig(**LAYER_OF_7B), dtype, DEVICE)
    exact = DecodeTransformer(*text_stack(copy.deepcopy(model).double()))
    transformer = DecodeTransformer(*text_stack(model))
    for gamma, prefixes in ((0, [700]), (5, [700]), (15, [4000]), (7, [700, 20, 300])):
        compare(transformer, exact, DraftTree.chain(gamma), prefixes)
    compare(transformer, exact, DraftTree.kary((3, 3, 4, 1)), [700])


def path_logits(transformer, cache, tokens, prefixes, tree, node, seed):
    """Logits of the tokens of a sequence, each at a node on the path to ``node``, pass after pass.

    The sequence is the last of the batch; every other token is random. The path's rows are kept.
    """
    path = list(tree.path(node))
    run = FusedPass(transformer, cache, tree.num_nodes, tree.on(DEVICE).mask)
    prefix = torch.tensor(prefixes, device=DEVICE)
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for start in range(0, len(tokens), len(path)):
        shape = (len(prefixes), tree.num_nodes)
        ids = torch.randint(transformer.vocab_size, shape, generator=generator).to(DEVICE)
        part = tokens[start : start + len(path)]
        ids[-1, path[: len(part)]] = part
        logits.append(run(ids, prefix)[-1, path[: len(part)]].clone())
        cache.keep_path(prefix, torch.tensor([path] * len(prefixes), device=DEVICE))
        prefix = prefix + len(path)
    return torch.cat(logits)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*CONFIGS, "7b"])
@torch.no_grad()
def test_a_token_has_the_same_bits_however_it_came(config):
    model = random_causal_lm(
        LlamaConfig(**LAYER_OF_7B) if config == "7b" else CONFIGS[config](), torch.bfloat16, DEVICE
    )
    transformer = DecodeTransformer(*text_stack(model))
    tokens = torch.randint(transformer.vocab_size, (24,), generator=torch.Generator().manual_seed(1)).to(
        DEVICE
    )
    small, large = DraftTree.kary((3, 2, 1)), DraftTree.kary((3, 3, 2, 1))
    forms = [
        ([45], DraftTree.chain(5), 5),
        ([45], DraftTree.chain(11), 11),
        ([45], small, 15),
        ([45], small, 11),
        ([45], large, 48),
        ([7, 45], small, 13),
        ([100, 3, 45], DraftTree.chain(3), 3),
        ([0, 1, 2, 3, 4, 5, 6, 45], DraftTree.chain(11), 11),
    ]
    start = random_cache(transformer, [45], 120)
    cache = clone(start)
    expected = path_logits(transformer, cache, tokens, [45], DraftTree.chain(0), 0, 0)
    for seed, (prefixes, tree, node) in enumerate(forms):
        cache = random_cache(transformer, prefixes, 120, seed, capacity=300)
        for name in ("keys", "values"):
            getattr(cache, name)[:, -1, :, :45] = getattr(start, name)[:, 0, :, :45]
        got = path_logits(transformer, cache, tokens, prefixes, tree, node, seed)
        assert torch.equal(got, expected), f"prefixes {prefixes}, {tree}"


@pytest.mark.gpu
@torch.no_grad()
def test_rows_after_the_first_slot_see_those_of_earlier_passes():
    transformer = DecodeTransformer(
        *text_stack(random_causal_lm(CONFIGS["grouped heads"](), torch.bfloat16, DEVICE))
    )
    cache = random_cache(transformer, [37], 8)
    other = clone(cache)
    mask = DraftTree.kary((2, 2)).on(DEVICE).mask
    ids, prefix = torch.arange(7, device=DEVICE)[None] + 20, torch.tensor([37], device=DEVICE)
    expected = FusedPass(transformer, cache, 7, mask)(ids, prefix).clone()
    for first, last in ((0, 1), (1, 3), (3, 7)):
        part = FusedPass(transformer, other, last - first, mask[first:last, :last], first)
        assert torch.equal(part(ids[:, first:last].contiguous(), prefix), expected[:, first:last])
    assert torch.equal(other.keys.view(torch.int16), cache.keys.view(torch.int16))


@pytest.mark.gpu
@torch.no_grad()
def test_logits_of_one_row_are_those_of_all_rows():
    transformer = DecodeTransformer(*text_stack(random_causal_lm(CONFIGS["qwen2"](), torch.float16, DEVICE)))
    for gamma, prefixes in ((5, [20]), (6, [20, 3, 40, 5]), (15, [20] * 8)):
        cache = random_cache(transformer, prefixes, gamma + 1)
        tree, prefix = DraftTree.chain(gamma), torch.tensor(prefixes, device=DEVICE)
        ids = torch.randint(1003, (len(prefixes), gamma + 1), device=DEVICE)
        run = FusedPass(transformer, cache, gamma + 1, tree.on(DEVICE).mask)
        every = run(ids, prefix).clone()
        for row in (0, gamma, gamma // 2):
            rows = (torch.arange(len(prefixes), device=DEVICE) + row) % (gamma + 1)
            one = run(ids, prefix, rows)
            assert one.shape == (len(prefixes), 1, 1003)
            assert torch.equal(one[:, 0], every[torch.arange(len(prefixes)), rows])


@pytest.mark.gpu
@torch.no_grad()
def test_ids_outside_the_embedding_count_as_id_0():
    transformer = DecodeTransformer(
        *text_stack(random_causal_lm(CONFIGS["multi-head"](), torch.bfloat16, DEVICE))
    )
    run = FusedPass(transformer, random_cache(transformer, [9], 3), 3, DraftTree.chain(2).on(DEVICE).mask)
    prefix = torch.tensor([9], device=DEVICE)
    inside = run(torch.tensor([[0, 5, 0]], device=DEVICE), prefix).clone()
    assert torch.equal(run(torch.tensor([[-1, 5, 1 << 40]], device=DEVICE), prefix), inside)


@pytest.mark.gpu
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@torch.no_grad()
def test_replays_of_a_graph_give_the_same_bits(num_layers):
    """Layers take turns with three buffers, across launches: every number of layers comes out elsewhere."""
    config = LlamaConfig(**{**SMALL, "num_hidden_layers": num_layers})
    transformer = DecodeTransformer(*text_stack(random_causal_lm(config, torch.bfloat16, DEVICE)))
    tree = DraftTree.kary((3, 2, 1))
    run = FusedPass(transformer, random_cache(transformer, [50, 300], 16), 16, tree.on(DEVICE).mask)
    ids = torch.randint(1003, (2, 16), device=DEVICE)
    prefix = torch.tensor([50, 300], device=DEVICE)
    expected = run(ids, prefix).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run(ids, prefix)
    for _ in range(50):
        logits.zero_()
        graph.replay()
        assert torch.equal(logits, expected)


@pytest.mark.gpu
@torch.no_grad()
def test_the_clock_goes_forward():
    transformer = DecodeTransformer(
        *text_stack(random_causal_lm(CONFIGS["grouped heads"](), torch.bfloat16, DEVICE))
    )
    run = FusedPass(transformer, random_cache(transformer, [50], 2), 2, DraftTree.chain(1).on(DEVICE).mask)
    run.clock = torch.zeros(5 * 3 + 3, dtype=torch.int64, device=DEVICE)
    run(torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), torch.tensor([50], device=DEVICE))
    times = run.clock.tolist()
    assert times[0] > 0
    assert times == sorted(times)


@pytest.mark.gpu
def test_tensors_that_do_not_fit_are_refused():
    transformer = DecodeTransformer(
        *text_stack(random_causal_lm(CONFIGS["grouped heads"](), torch.bfloat16, DEVICE))
    )
    cache, mask = transformer.new_cache(2, 40), DraftTree.chain(2).on(DEVICE).mask
    run = FusedPass(transformer, cache, 3, mask)
    ids, prefix = (
        torch.zeros(2, 3, dtype=torch.int64, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    with pytest.raises(ValueError, match=r"token_ids must be \[B=2, R=3\] int64 .*, got \[2, 2\]"):
        run(ids[:, :2], prefix)
    with pytest.raises(ValueError, match=r"prefix must be \[B=2\] int64 .*int32"):
        run(ids, prefix.int())
    with pytest.raises(ValueError, match=r"logit_row must be \[B=2\]"):
        run(ids, prefix, prefix[:1])
    with pytest.raises(ValueError, match="token_ids must be contiguous"):
        run(ids.repeat(1, 2)[:, ::2], prefix)
    with pytest.raises(ValueError, match="the cache has 40 rows, but the pass needs 41"):
        FusedPass(transformer, cache, 1, torch.ones(1, 41, dtype=torch.bool).tril(), 0)


def test_what_a_mask_must_be():
    tree = DraftTree.kary((2, 1))
    assert visible_slots(tree.on("cpu").mask, 5, 0) == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    assert visible_slots(tree.on("cpu").mask[3:], 2, 3) == [[0, 1, 3], [0, 2, 4]]
    with pytest.raises(ValueError, match=r"mask must be \[R=3, S\] bool, got \[5, 5\]"):
        visible_slots(tree.on("cpu").mask, 3, 0)
    with pytest.raises(ValueError, match="row 0 must see itself, slot 1, and none after it"):
        visible_slots(tree.on("cpu").mask, 5, 1)
    with pytest.raises(ValueError, match="row 17 must see 1 to 17 scratch rows, got 18"):
        visible_slots(torch.ones(18, 18, dtype=torch.bool).tril(), 18, 0)
    with pytest.raises(ValueError, match="row 0 must see 1 to 17 scratch rows, got 0"):
        visible_slots(torch.zeros(1, 4, dtype=torch.bool), 1, 0)


@pytest.mark.parametrize(
    ("change", "batch", "rows", "reason"),
    [
        ({}, 1, 1, "float32 weights, only bfloat16 and float16"),
        ({"dtype": torch.bfloat16, "hidden_act": "gelu"}, 1, 1, "the activation GELUActivation, only SiLU"),
        ({"dtype": torch.bfloat16, "mlp_bias": True}, 1, 1, "a bias of down_bias, gate_up_bias, only"),
        ({"dtype": torch.bfloat16, "attention_bias": True}, 1, 1, "a bias of output_bias, only"),
        ({"dtype": torch.bfloat16, "head_dim": 32}, 1, 1, "heads of 32, only of 64 and 128"),
        ({"dtype": torch.bfloat16, "intermediate_size": 100}, 1, 1, "intermediate size 100, only multiples"),
        ({"dtype": torch.bfloat16}, 9, 1, "9 sequences, only 1 to 8"),
        ({"dtype": torch.bfloat16}, 2, 65, "2 sequences of 65 rows, only 1 to 128 rows in all"),
        ({"dtype": torch.bfloat16}, 1, 1, "weights on cpu, only on a GPU"),
    ],
)
def test_what_is_not_supported_is_named(change, batch, rows, reason):
    config = {"hidden_size": 64, "head_dim": 64, "dtype": torch.float32, **change}
    dtype = config.pop("dtype")
    transformer = DecodeTransformer(*text_stack(tiny_llama(**config).to(dtype)))
    cache = transformer.new_cache(batch, 20)
    assert reason in unsupported(transformer, cache, rows)
    with pytest.raises(ValueError, match="the fused pass does not support"):
        FusedPass(transformer, cache, rows, torch.ones(rows, rows, dtype=torch.bool).tril())
