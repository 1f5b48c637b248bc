"""The decode-time transformer computes what transformers computes, and touches only the rows it should."""

import contextlib
import copy
import threading

import pytest
import torch
from models import tiny_llama, tiny_llava
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from fastspec import DraftTree
from fastspec.model.cache import CacheView
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import text_stack


def build(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama with biases and head_dim": lambda: LlamaConfig(
        **SMALL, head_dim=16, attention_bias=True, mlp_bias=True
    ),
    "multi-head": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "linear rope": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
    "llama3 rope": lambda: LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e4,
        },
    ),
    "yarn rope": lambda: LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
    ),
    "tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_prefill_and_chain_equal_transformers(name):
    model = build(CONFIGS[name]())
    ids = torch.randint(50, (1, 17))
    expected = model(input_ids=ids).logits[0]
    ours = DecodeTransformer(*text_stack(model))
    cache = ours.new_cache(1, 32)
    split = 11
    hidden = ours.prefill(ours.embed(ids[0, :split]), cache, 0)
    torch.testing.assert_close(ours.logits(hidden), expected[:split], rtol=1e-6, atol=1e-6)
    tree = DraftTree.chain(5).on("cpu")
    prefix = torch.tensor([split])
    hidden = ours.forward(
        ours.embed(ids[:, split:]), prefix[:, None] + tree.depths, cache, CacheView(prefix, tree.mask)
    )
    torch.testing.assert_close(ours.logits(hidden)[0], expected[split:], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_every_tree_node_equals_a_forward_over_its_own_path():
    model = build(CONFIGS["llama"]())
    ours = DecodeTransformer(*text_stack(model))
    tree = DraftTree.from_children([[1, 2, 3], [4, 5], [], [6], [], [7], [], []])
    cache = ours.new_cache(2, 40)
    prompts = [torch.randint(50, (9,)), torch.randint(50, (4,))]
    tokens = torch.randint(50, (2, tree.num_nodes))
    for row, prompt in enumerate(prompts):
        ours.prefill(ours.embed(prompt), cache, row)
    prefix = torch.tensor([9, 4])
    tables = tree.on("cpu")
    hidden = ours.forward(
        ours.embed(tokens), prefix[:, None] + tables.depths, cache, CacheView(prefix, tables.mask)
    )
    logits = ours.logits(hidden)
    for row, prompt in enumerate(prompts):
        for node in range(tree.num_nodes):
            sequence = torch.cat([prompt, tokens[row, list(tree.path(node))]])[None]
            torch.testing.assert_close(logits[row, node], model(sequence).logits[0, -1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_accepted_path_is_kept_and_the_next_pass_continues_it():
    model = build(CONFIGS["llama"]())
    ours = DecodeTransformer(*text_stack(model))
    tree = DraftTree.kary((2, 2))
    tables = tree.on("cpu")
    prompt, tokens = torch.randint(50, (6,)), torch.randint(50, (1, tree.num_nodes))
    cache = ours.new_cache(1, 32)
    ours.prefill(ours.embed(prompt), cache, 0)
    prefix = torch.tensor([6])
    ours.forward(ours.embed(tokens), prefix[:, None] + tables.depths, cache, CacheView(prefix, tables.mask))
    cache.keep_path(prefix, tables.paths[[6]])
    following = torch.tensor([[13]])
    prefix = torch.tensor([9])
    one = DraftTree.chain(0).on("cpu")
    hidden = ours.forward(ours.embed(following), prefix[:, None], cache, CacheView(prefix, one.mask))
    sequence = torch.cat([prompt, tokens[0, [0, 2, 6]], following[0]])[None]
    torch.testing.assert_close(ours.logits(hidden)[0, 0], model(sequence).logits[0, -1], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_poison_beyond_the_written_rows_is_neither_read_nor_touched():
    model = build(CONFIGS["llama"]())
    ours = DecodeTransformer(*text_stack(model))
    prompt, tokens = torch.randint(50, (7,)), torch.randint(50, (1, 4))
    tables, prefix = DraftTree.kary((3,)).on("cpu"), torch.tensor([7])

    def run(fill):
        cache = ours.new_cache(1, 24)
        cache.keys.fill_(fill)
        cache.values.fill_(fill)
        ours.prefill(ours.embed(prompt), cache, 0)
        hidden = ours.forward(
            ours.embed(tokens), prefix[:, None] + tables.depths, cache, CacheView(prefix, tables.mask)
        )
        return ours.logits(hidden), cache

    clean, _ = run(0.0)
    poisoned, cache = run(float("nan"))
    assert torch.equal(clean, poisoned)
    for stored in (cache.keys, cache.values):
        assert stored[..., 11:, :].isnan().all()
        assert not stored[..., :11, :].isnan().any()


def test_packing_shares_storage_and_leaves_the_module_as_it_was(tmp_path):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    first = DecodeTransformer(*text_stack(model))
    attention = model.model.layers[0].self_attn
    assert (
        attention.k_proj.weight.untyped_storage().data_ptr()
        == first.layers[0].qkv.untyped_storage().data_ptr()
    )
    second = DecodeTransformer(*text_stack(model))
    assert second.layers[0].qkv.data_ptr() == first.layers[0].qkv.data_ptr(), (
        "packing twice must copy nothing"
    )
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, before[name]), name
    moved = [name for name, parameter in model.named_parameters() if parameter.data_ptr() != pointers[name]]
    assert all("_proj" in name for name in moved)
    with torch.no_grad():
        attention.v_proj.weight.mul_(2)
    assert torch.equal(first.layers[0].qkv[-len(attention.v_proj.weight) :], attention.v_proj.weight)

    model.save_pretrained(tmp_path)
    restored = type(model).from_pretrained(tmp_path)
    for name, parameter in restored.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name


def test_threads_that_pack_a_model_together_read_the_same_weights(monkeypatch):
    model = tiny_llama()
    together, cat = threading.Barrier(2, timeout=0.2), torch.cat

    def meet(*inputs, **more):
        with contextlib.suppress(threading.BrokenBarrierError):  # the other thread was not let in: good
            together.wait()
        return cat(*inputs, **more)

    made = []
    threads = [
        threading.Thread(target=lambda: made.append(DecodeTransformer(*text_stack(model)))) for _ in range(2)
    ]
    monkeypatch.setattr(torch, "cat", meet)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    (layer,) = model.model.layers
    with torch.no_grad():
        layer.self_attn.q_proj.weight.fill_(1.0)
        layer.mlp.up_proj.weight.fill_(2.0)
    for transformer in made:
        (packed,) = transformer.layers
        assert (packed.qkv[: transformer.hidden_size] == 1).all()
        assert (packed.gate_up[len(packed.gate_up) // 2 :] == 2).all()
    assert len(made) == 2


def test_weights_replaced_after_packing_are_packed_anew():
    model = tiny_llama()
    DecodeTransformer(*text_stack(model))
    model.to(torch.float64)
    again = DecodeTransformer(*text_stack(model))
    assert again.dtype == torch.float64
    torch.testing.assert_close(
        again.layers[0].qkv[: model.config.hidden_size], model.model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "unsupported text model 'gemma2'; supported: llama, mistral, qwen2"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "unsupported RoPE 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"sliding_window": 64}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
    ],
)
def test_architectures_that_would_be_wrong_are_refused(change, message):
    model = tiny_llava()
    for name, value in change.items():
        object.__setattr__(model.config.text_config, name, value)
        model.model.language_model.config.__dict__[name] = value
    with pytest.raises(ValueError, match=message):
        DecodeTransformer(*text_stack(model))


def test_adapters_and_offloaded_weights_are_refused():
    class Adapter(torch.nn.Linear):
        pass

    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Adapter(16, 32)
    with pytest.raises(ValueError, match=r"plain nn.Linear projections, got Adapter: merge adapters"):
        DecodeTransformer(*text_stack(model))
    model = tiny_llama()
    model.lm_head = Adapter(16, 64)
    with pytest.raises(ValueError, match=r"plain nn.Linear output projections, got Adapter: merge adapters"):
        DecodeTransformer(*text_stack(model))

    class AdaptedEmbedding(torch.nn.Embedding):
        pass

    model = tiny_llama()
    model.model.embed_tokens = AdaptedEmbedding(64, 16)
    with pytest.raises(ValueError, match=r"plain nn.Embedding embeddings, got AdaptedEmbedding"):
        DecodeTransformer(*text_stack(model))
    for name in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        model = tiny_llama()
        model.model.set_submodule(name, torch.nn.LayerNorm(16))
        with pytest.raises(ValueError, match="expected an RMSNorm, got LayerNorm"):
            DecodeTransformer(*text_stack(model))
    offloaded = tiny_llama().to("meta")
    with pytest.raises(ValueError, match="weights in memory, got a model on the meta device"):
        DecodeTransformer(*text_stack(offloaded))
