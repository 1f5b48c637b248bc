"""Reading a prompt: kernels as exact as PyTorch's operations, only its own rows written, no waiting for the device."""

import copy
import sys
import types
import warnings

import pytest
import torch
from models import (
    IMAGE_TOKEN_ID,
    IMAGE_TOKENS,
    LAYER_OF_7B,
    noisy_clone,
    picture_inputs,
    random_causal_lm,
    tiny_llama,
    tiny_llava,
)
from test_verify import INTERPRETED
from torch.nn import functional as F
from transformers import LlamaConfig, Qwen2Config
from transformers.activations import ACT2FN

from fastspec import DraftTree, SpeculativeDecoder
from fastspec.decoder import Request
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import Prompt, text_stack
from fastspec.ops import causal_attention as attention
from fastspec.ops import prefill as ops
from fastspec.ops.backends import Backend
from fastspec.sampling import SamplingParams
from fastspec.state import DecodeState

DTYPES = (torch.bfloat16, torch.float16)
SILU = ACT2FN["silu"]


def same_bits(one, other):
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def error_ratio(ours, theirs, exact):
    """Largest errors of ours beside those of the same operation in PyTorch."""
    ours, theirs = ((one.double() - exact).abs().max().item() for one in (ours, theirs))
    return ours / theirs if theirs else float(ours > 0) * float("inf")


@pytest.fixture
def nearest(monkeypatch):
    """Lets Triton's interpreter round to the nearest bfloat16, as a GPU does; by itself it cuts the rest off."""
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        bits = torch.tensor(data).bfloat16().view(torch.int16)
        return bits.numpy().view("uint16").reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


# The operations, each against its reference


def check_add_norm(rows, size, dtype, device):
    torch.manual_seed(rows + size)
    hidden, update = (torch.randn(rows, size, device=device, dtype=dtype) * 3 for _ in range(2))
    weight = torch.randn(size, device=device, dtype=dtype)
    for change in (None, update):
        stream, normed = ops.add_norm(hidden, change, weight, 1e-5)
        exact = ops.rms_norm(stream.double(), weight.double(), 1e-5)
        given, own = hidden.clone(), None if change is None else change.clone()
        our_stream, ours = ops.add_norm(given, own, weight, 1e-5, "triton")
        assert same_bits(our_stream, stream)
        assert same_bits(given, hidden), "the caller's rows must stay"
        assert error_ratio(ours, normed, exact) <= 2


def check_rotate(rows, heads, kv_heads, head_dim, dtype, device):
    torch.manual_seed(rows + heads)
    fused = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    angles = torch.randn(rows, head_dim // 2, device=device).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # Three sequences in a cache of poison; the second is written, and of that only the first rows.
    caches = {
        backend: torch.full((2, 3, kv_heads, rows + 3, head_dim), float("nan"), device=device, dtype=dtype)
        for backend in ("reference", "triton")
    }
    queries = {}
    for backend, cache in caches.items():
        keys, values = cache[:, 1, :, :rows].transpose(1, 2)
        queries[backend] = ops.rotate_prompt(fused.clone(), cos, sin, keys, values, backend)
    assert queries["triton"].shape == (rows, heads, head_dim)
    assert torch.equal(queries["triton"], queries["reference"])
    ours = caches["triton"]
    assert torch.equal(ours[:, 1, :, :rows], caches["reference"][:, 1, :, :rows])
    ours[:, 1, :, :rows] = float("nan")
    assert same_bits(ours, torch.full_like(ours, float("nan"))), "other rows of the cache must stay"


def check_gate(rows, size, dtype, device):
    torch.manual_seed(rows + size)
    gate_up = torch.randn(rows, 2 * size, device=device, dtype=dtype) * 4
    gate_up[0, :4] = torch.tensor([0.0, 60.0, -60.0, -200.0])
    exact = ops.gate(gate_up.double(), SILU)
    ours, theirs = ops.gate(gate_up, SILU, "triton"), ops.gate(gate_up, SILU)
    assert ours.shape == theirs.shape
    assert error_ratio(ours, theirs, exact) <= 2


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("nearest")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_operations_equal_their_references_when_interpreted(dtype):
    for rows, size in ((1, 32), (3, 48), (5, 320), (2, 1030)):
        check_add_norm(rows, size, dtype, "cpu")
        check_gate(rows, size, dtype, "cpu")
    for shape in (
        (1, 4, 4, 64),
        (5, 4, 2, 128),
        (3, 7, 1, 64),
        (2, 24, 8, 128),
        (3, 4, 2, 80),
        (17, 2, 1, 16),
    ):
        check_rotate(*shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_equal_their_references(dtype):
    for rows, size in ((1, 1024), (3, 48), (640, 4096), (641, 5120), (17, 16384)):
        check_add_norm(rows, size, dtype, "cuda")
    for rows, size in ((1, 64), (640, 11008), (641, 2816), (17, 18944)):
        check_gate(rows, size, dtype, "cuda")
    for shape in ((640, 32, 32, 128), (641, 28, 4, 128), (1, 16, 16, 64), (17, 7, 1, 64), (33, 32, 8, 80)):
        check_rotate(*shape, dtype, "cuda")


def test_other_activations_take_the_reference():
    gate_up = torch.randn(3, 8, dtype=torch.bfloat16)
    gelu = ACT2FN["gelu"]
    assert torch.equal(ops.gate(gate_up, gelu, "triton"), ops.gate(gate_up, gelu))


def test_a_prompt_that_the_cache_has_no_rows_for_is_refused():
    transformer = DecodeTransformer(*text_stack(tiny_llama()))
    with pytest.raises(ValueError, match="a prompt of 9 tokens does not fit a cache of 8 rows"):
        transformer.prefill(torch.zeros(9, 16), transformer.new_cache(1, 8), 0)
    keys = torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match="a prompt of 3 tokens needs as many rows of keys and values, got 2"):
        ops.rotate_prompt(torch.zeros(3, 96), torch.ones(3, 16), torch.ones(3, 16), keys, keys)


# The whole prefill

SMALL = {
    "vocab_size": 50,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "grouped heads of 64": lambda: LlamaConfig(**SMALL, head_dim=64),
    "one key head of 128": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=128),
    "every bias": lambda: LlamaConfig(**SMALL, head_dim=64, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gelu": lambda: LlamaConfig(**SMALL, hidden_act="gelu"),
}


@torch.no_grad()
def check_prefill(config, dtype, device, lengths, monkeypatch):
    """Hidden states and cache beside those of the same layers in PyTorch, both against float64; poison around."""
    model = random_causal_lm(config, dtype, device)
    exact = DecodeTransformer(*text_stack(copy.deepcopy(model).double()))
    transformer = DecodeTransformer(*text_stack(model))
    assert transformer.dtype == dtype

    def run(transformer, backend, ids):
        monkeypatch.setenv("FASTSPEC_BACKEND", backend)
        cache = transformer.new_cache(3, max(lengths) + 5)
        cache.keys.fill_(float("nan"))
        cache.values.fill_(float("nan"))
        embeddings = transformer.embed(ids)
        given = embeddings.clone()
        hidden = transformer.prefill(embeddings, cache, 1)
        assert torch.equal(embeddings, given), "the caller's embeddings must stay"
        return hidden, cache

    for length in lengths:
        ids = torch.randint(50, (length,)).to(device)
        truth, true_cache = run(exact, "reference", ids)
        theirs, their_cache = run(transformer, "reference", ids)
        ours, cache = run(transformer, "triton", ids)
        place = f"{length} tokens"
        assert error_ratio(ours, theirs, truth) <= 2, place
        for name in ("keys", "values"):
            mine, usual, right = (getattr(one, name) for one in (cache, their_cache, true_cache))
            rows = (slice(None), 1, slice(None), slice(length))
            assert error_ratio(mine[rows], usual[rows], right[rows]) <= 2, f"{place}: {name}"
            mine[rows] = float("nan")
            assert same_bits(mine, torch.full_like(mine, float("nan"))), f"{place}: {name} elsewhere"


@INTERPRETED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("nearest")
def test_prefill_is_as_exact_as_pytorchs_when_interpreted(name, dtype, monkeypatch):
    check_prefill(CONFIGS[name](), dtype, "cpu", (1, 7), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_is_as_exact_as_pytorchs(name, dtype, monkeypatch):
    check_prefill(CONFIGS[name](), dtype, "cuda", (1, 2, 15, 16, 17, 64, 129, 640), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_of_a_layer_of_the_7b_is_as_exact_as_pytorchs(dtype, monkeypatch):
    check_prefill(LlamaConfig(**{**LAYER_OF_7B, "vocab_size": 64}), dtype, "cuda", (640, 641), monkeypatch)


@pytest.mark.gpu
@torch.no_grad()
def test_kernels_are_compiled_once_for_all_lengths(monkeypatch):
    from fastspec.kernels import prefill as kernels

    monkeypatch.setenv("FASTSPEC_BACKEND", "triton")
    transformer = DecodeTransformer(*text_stack(random_causal_lm(CONFIGS["qwen2"](), torch.bfloat16, "cuda")))

    def compiled():
        every = (kernels.add_norm_kernel, kernels.rotate_kernel, kernels.gate_kernel)
        return sum(len(cached[0]) for kernel in every for cached in kernel.device_caches.values())

    counts = []
    for length in (1, 2, 16, 17, 256):
        cache = transformer.new_cache(1, length + 3)
        transformer.prefill(transformer.embed(torch.ones(length, dtype=torch.int64).cuda()), cache, 0)
        counts.append(compiled())
    assert len(set(counts)) == 1


# The choice of kernels


def test_the_choice_follows_the_environment_and_the_dtype(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    assert ops.choose_backend(torch.bfloat16, 64, cpu) == "reference"
    monkeypatch.setenv("FASTSPEC_BACKEND", "reference")
    assert ops.choose_backend(torch.bfloat16, 64, cpu) == "reference"
    monkeypatch.setenv("FASTSPEC_BACKEND", "fastest")
    with pytest.raises(ValueError, match="FASTSPEC_BACKEND must be one of"):
        ops.choose_backend(torch.bfloat16, 64, cpu)


@INTERPRETED
def test_single_precision_and_wide_rows_keep_pytorchs_operations(monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", "triton")
    cpu = torch.device("cpu")
    assert ops.choose_backend(torch.float16, ops.MAX_HIDDEN_SIZE, cpu) == "triton"
    assert ops.choose_backend(torch.float16, ops.MAX_HIDDEN_SIZE + 1, cpu) == "reference"
    assert ops.choose_backend(torch.float32, 64, cpu) == "reference"


def test_where_triton_cannot_compile_the_reference_reads_prompts(monkeypatch):
    """The CUDA kernels are there, so nobody asked for Triton by name; it may lack a C compiler."""
    monkeypatch.setattr(ops, "choose", lambda requested, device, supported: "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "triton_version", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.choose_backend(torch.bfloat16, 64, torch.device("cpu")) == "reference"

    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    ops._triton_compiles.cache_clear()
    monkeypatch.setattr(ops, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(ops, "gate", fail)
    with pytest.warns(RuntimeWarning, match="without the Triton kernels: Failed to find C compiler"):
        assert ops.choose_backend(torch.bfloat16, 64, torch.device("cpu")) == "reference"
    ops._triton_compiles.cache_clear()
    monkeypatch.setattr(ops, "gate", lambda *_: None)
    assert ops.choose_backend(torch.bfloat16, 64, torch.device("cpu")) == "triton"
    ops._triton_compiles.cache_clear()


# Attention


def sdpa(queries, keys, values, scale):
    """Causal attention of ``[B, T, heads, head_dim]`` by PyTorch."""
    mixed = F.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in (queries, keys, values)),
        is_causal=True,
        scale=scale,
        enable_gqa=True,
    )
    return mixed.transpose(1, 2)


class Flash:
    """A ``flash_attn_func`` that notes its calls and computes by PyTorch."""

    def __init__(self, returns_tuple=False, fails=None):
        self.calls, self._returns_tuple, self._fails = [], returns_tuple, fails

    def __call__(self, q, k, v, softmax_scale=None, causal=False):
        self.calls.append((q.shape, k.shape, v.shape, softmax_scale, causal))
        if self._fails is not None:
            raise self._fails
        out = sdpa(q, k, v, softmax_scale)
        return (out, None) if self._returns_tuple else out


@pytest.fixture
def machine(monkeypatch):
    """Pretends to have a GPU and the given versions of flash-attn."""

    def clear():
        attention.flash_choices.cache_clear()
        attention._flash_function.cache_clear()

    def pretend(functions, capability=9):
        for flash in attention.FLASH:
            module = None
            if flash.module in functions:
                module = types.ModuleType(flash.module)
                module.flash_attn_func = functions[flash.module]
            monkeypatch.setitem(sys.modules, flash.module, module)  # None: the import fails
        if "flash_attn.cute" in functions and "flash_attn" not in functions:
            monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # a bare namespace
        monkeypatch.setattr(attention, "_major_capability", lambda device: capability)
        clear()

    monkeypatch.delenv("FASTSPEC_BACKEND", raising=False)
    yield pretend
    clear()


LONG = max(flash.least_tokens for flash in attention.FLASH)


def heads(length=LONG, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return tuple(torch.randn(1, length, count, 16, dtype=dtype) for count in (4, 2, 2))


@pytest.mark.parametrize("module", ["flash_attn.cute", "flash_attn_interface", "flash_attn"])
def test_every_flash_attention_is_called_by_its_own_interface(module, machine):
    flash = Flash(returns_tuple=module == "flash_attn.cute")
    machine({module: flash})
    queries, keys, values = heads()
    mixed = attention.causal_attention(queries, keys, values, 0.3)
    assert torch.equal(mixed, sdpa(queries, keys, values, 0.3))
    assert flash.calls == [(queries.shape, keys.shape, values.shape, 0.3, True)]


def test_the_newest_flash_attention_that_the_gpu_knows_is_taken(machine):
    every = {"flash_attn.cute": Flash(True), "flash_attn_interface": Flash(), "flash_attn": Flash()}
    for capability, chosen in ((10, "flash_attn.cute"), (9, "flash_attn.cute"), (8, "flash_attn"), (7, None)):
        machine(every, capability)
        attention.causal_attention(*heads(), 0.25)
        assert {name: len(flash.calls) for name, flash in every.items()} == {
            name: int(name == chosen) for name in every
        }
        for flash in every.values():
            flash.calls.clear()
    del every["flash_attn.cute"]
    machine(every)
    attention.causal_attention(*heads(), 0.25)
    assert len(every["flash_attn_interface"].calls) == 1


def test_pytorch_attends_where_flash_attention_would_not(machine, monkeypatch):
    flash = Flash()
    machine({"flash_attn": flash})
    short, exact = heads(255), heads(dtype=torch.float32)
    for inputs in (short, exact):
        assert torch.equal(attention.causal_attention(*inputs, 0.25), sdpa(*inputs, 0.25))
    monkeypatch.setenv("FASTSPEC_BACKEND", "reference")
    attention.causal_attention(*heads(), 0.25)
    assert not flash.calls


def test_a_prompt_too_short_for_one_flash_attention_may_be_long_enough_for_another(machine):
    every = {"flash_attn.cute": Flash(True), "flash_attn": Flash()}
    machine(every)
    for length, chosen in ((255, None), (256, "flash_attn"), (2047, "flash_attn"), (2048, "flash_attn.cute")):
        attention.causal_attention(*heads(length), 0.25)
        assert [name for name, flash in every.items() if flash.calls] == ([chosen] if chosen else [])
        for flash in every.values():
            flash.calls.clear()


def test_a_flash_attention_that_fails_is_left_out_with_one_warning(machine):
    broken = Flash(fails=AssertionError("head_dim 16 is not supported"))
    second = Flash(fails=RuntimeError("no kernel image"))
    machine({"flash_attn.cute": broken, "flash_attn": second})
    inputs = heads()
    with pytest.warns(RuntimeWarning) as caught:
        mixed = attention.causal_attention(*inputs, 0.25)
    assert torch.equal(mixed, sdpa(*inputs, 0.25))
    assert [str(one.message) for one in caught] == [
        "flash-attn 4 does not run here and is left out: AssertionError: head_dim 16 is not supported",
        "flash-attn 2 does not run here and is left out: RuntimeError: no kernel image",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.causal_attention(*inputs, 0.25)
    assert len(broken.calls) == len(second.calls) == 1


def test_memory_that_runs_out_is_no_reason_to_leave_it_out(machine):
    full = Flash(fails=torch.OutOfMemoryError("CUDA out of memory"))
    machine({"flash_attn": full})
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            attention.causal_attention(*heads(), 0.25)
    assert len(full.calls) == 2


def test_info_tells_which_attention_reads_prompts(machine, run):
    machine({"flash_attn.cute": Flash()}, capability=8)
    four, three, two, pytorch = attention.attentions()
    assert not four.available
    assert "compute capability 9.0" in four.reason or not torch.cuda.is_available()
    assert three == Backend("flash-attn 3", False, three.reason)
    assert two.reason == "flash_attn has no flash_attn_func"
    assert pytorch.available
    out = run("info")[1]
    assert "attention PyTorch       on " in out
    assert "attention flash-attn 3  off" in out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("flash", attention.FLASH, ids=lambda flash: flash.name)
def test_installed_flash_attention_is_as_exact_as_pytorchs(flash, head_dim, dtype):
    if not attention._imports(flash.module):
        pytest.skip(f"{flash.name} is not installed")
    torch.manual_seed(0)
    for length, kv_heads in ((flash.least_tokens, 4), (flash.least_tokens + 641, 2)):
        cache = torch.randn(2, kv_heads, length + 7, head_dim, device="cuda", dtype=dtype)
        keys, values = cache[:, :, :length].transpose(1, 2)[:, None]
        fused = torch.randn(length, 4 + 2 * kv_heads, head_dim, device="cuda", dtype=dtype)
        queries = fused[None, :, :4]  # the layouts of the prefill
        attention.flash_choices.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = attention.causal_attention(queries, keys, values, 0.1)
        theirs = sdpa(queries, keys, values, 0.1)
        exact = sdpa(queries.double(), keys.double(), values.double(), 0.1)
        assert error_ratio(ours, theirs, exact) <= 2


# From the prompt to the first token


def test_features_stand_in_place_of_the_placeholders():
    transformer = DecodeTransformer(*text_stack(tiny_llama(hidden_size=16)))
    image = [IMAGE_TOKEN_ID] * 2
    ids = torch.tensor([1, *image, 9, 8, *image, 11])
    features = torch.randn(2, 2, 16)
    prompt = Prompt(ids, IMAGE_TOKEN_ID, tuple(features))
    embeddings = prompt.embeddings(transformer)
    assert torch.equal(embeddings[[1, 2, 5, 6]], features.flatten(0, 1))
    text = [0, 3, 4, 7]
    assert torch.equal(embeddings[text], transformer.embed(ids[text]))
    assert prompt.text_ids.tolist() == [1, 9, 8, 11]
    plain = Prompt(ids[[0, 3, 4]], IMAGE_TOKEN_ID)
    assert plain.text_ids.tolist() == [1, 9, 8]
    assert torch.equal(plain.embeddings(transformer), transformer.embed(plain.input_ids))


def test_admission_marks_what_was_seen():
    state = DecodeState(2, 16, DraftTree.chain(1), 10, "cpu")
    greedy = SamplingParams(temperature=0)
    state.admit(1, torch.tensor([3, 12, 3, -1, 9]), 12, greedy, greedy, 0, (2, 7), (4, 4))
    assert state.sampling.seen[1].nonzero()[:, 0].tolist() == [3, 4, 9]
    assert not state.sampling.seen[0].any()
    assert state.sampling.eos_token_ids[1].tolist() == [2, 7] + [-1] * 14
    state.admit(1, torch.tensor([3]), 12, greedy, greedy, 0, (5,))
    assert state.sampling.eos_token_ids[1].tolist() == [5] + [-1] * 15


@pytest.mark.gpu
@pytest.mark.parametrize("images", [0, 1])
def test_the_host_never_waits_between_prompt_and_first_token(images):
    target = tiny_llava(layers=2).to("cuda", torch.bfloat16)
    draft = noisy_clone(tiny_llama()).to("cuda", torch.bfloat16)
    inputs = {name: tensor.cuda() for name, tensor in picture_inputs(1, images=images).items()}
    features = torch.randn(IMAGE_TOKENS, 32, device="cuda", dtype=torch.bfloat16)
    decoder = SpeculativeDecoder(target, draft, gamma=3, capacity=64)
    request = Request(
        Prompt(inputs["input_ids"][0], IMAGE_TOKEN_ID, (features,) * images),
        max_new_tokens=4,
        params=SamplingParams(temperature=0.7),
        eos_token_ids=(2,),
        padding_ids=(0,),
    )
    decoder.prefill([request])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.prefill([request])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(decoder.poll().tokens[0]) == 1
