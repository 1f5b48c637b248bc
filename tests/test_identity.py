"""Speculative decoding says token for token what plain decoding says, and greedily what transformers says."""

from dataclasses import replace

import pytest
import torch
from models import left_padded, sharpen, texts, tiny_llama
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

import fastspec
from bench import exact
from bench.setup import Setup
from fastspec import DraftTree, SpeculativeDecoder, miniature
from fastspec.decoder import Request
from fastspec.generation import make_prompts
from fastspec.sampling import SamplingParams
from fastspec.verification import Rule

needs_weights = pytest.mark.skipif(
    not (miniature.WEIGHTS / "target" / "model.safetensors").is_file(), reason="no trained weights"
)
SHAPES = {"chain": {"gamma": 5}, "tree": {"tree": DraftTree.kary((3, 2, 1))}}


@pytest.fixture(scope="module")
def models():
    return miniature.load_target(), miniature.load_draft()


@pytest.fixture(scope="module")
def batches(request):
    """Inputs for held-out pictures of all three tasks: the prompts alone, and in ragged batches of 8."""
    processor = miniature.load_processor()
    pairs = miniature.prompts(104 if request.config.getoption("--exhaustive") else 12)

    def inputs(chosen):
        images, texts = zip(*chosen, strict=True)
        return processor(
            images=list(images), text=list(texts), padding=True, padding_side="left", return_tensors="pt"
        )

    alone = pairs if request.config.getoption("--exhaustive") else pairs[:4]
    return [inputs([pair]) for pair in alone] + [inputs(pairs[n : n + 8]) for n in range(0, len(pairs), 8)]


def plain(target, inputs, max_new_tokens):
    """The answers of the same cycle with a tree of one node."""
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    starts = (mask == 0).sum(1).tolist()
    prompts = make_prompts(target, ids, starts, dict(inputs))
    params = SamplingParams(temperature=0.0)
    requests = [Request(prompt, max_new_tokens, params, eos_token_ids=(2,)) for prompt in prompts]
    decoder = SpeculativeDecoder(target, None, batch_size=len(ids), capacity=512)
    answers = [[] for _ in requests]
    for commitment in decoder.stream(requests):
        for answer, tokens in zip(answers, commitment.tokens, strict=True):
            answer += tokens
    return answers


@needs_weights
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_of_the_miniature(models, batches, shape, exhaustive):
    target, draft = models
    greedy = {"do_sample": False, "max_new_tokens": 160 if exhaustive else 32}
    drafted = 0
    for inputs in batches:
        expected = target.generate(**inputs, **greedy)
        output = fastspec.generate(
            target, draft=draft, **inputs, **greedy, **SHAPES[shape], return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, expected)
        drafted += sum(map(sum, output.speculation.drafted))
    assert drafted > 0, "the draft never proposed what the target says, so nothing was tested"


@needs_weights
def test_plain_decoding_is_the_same_cycle(models, batches, exhaustive):
    target, _ = models
    for inputs in batches if exhaustive else batches[-1:]:
        new = 160 if exhaustive else 40
        expected = target.generate(**inputs, do_sample=False, max_new_tokens=new)
        for answer, row in zip(plain(target, inputs, new), expected, strict=True):
            said = row[inputs["input_ids"].shape[1] :].tolist()
            assert answer == said[: len(answer)]
            assert len(answer) == new or answer[-1] == 2


# On the GPU in bfloat16, where a captured cycle runs the fused pass.

NUM_PROMPTS, NUM_TOKENS, CAPACITY = 104, 128, 512


@pytest.fixture(scope="module")
def target_on_gpu():
    return miniature.load_target(torch.bfloat16, "cuda")


@pytest.fixture(scope="module")
def prompts_on_gpu(target_on_gpu):
    """Prompts about held-out pictures of all tasks, their features made once for all decoders."""
    processor = miniature.load_processor()
    prompts = []
    for image, text in miniature.prompts(NUM_PROMPTS):
        inputs = processor(images=image, text=text, return_tensors="pt").to("cuda", torch.bfloat16)
        prompts += make_prompts(target_on_gpu, inputs["input_ids"], [0], dict(inputs))
    return prompts


@pytest.mark.gpu
@needs_weights
def test_greedy_text_of_the_miniature_is_bit_for_bit_that_of_plain_decoding(target_on_gpu, prompts_on_gpu):
    """Raw logits included, whatever tree and batch."""
    draft = miniature.load_draft("ft", torch.bfloat16, "cuda")
    params = SamplingParams(temperature=0.0)
    requests = [Request(prompt, NUM_TOKENS, params, eos_token_ids=(2,)) for prompt in prompts_on_gpu]
    expected = exact.answers(SpeculativeDecoder(target_on_gpu, None, capacity=CAPACITY), requests)
    for batch_size in (1, 8):
        sizes = {"batch_size": batch_size, "capacity": CAPACITY}
        assert exact.answers(SpeculativeDecoder(target_on_gpu, None, **sizes), requests) == expected
        for tree in exact.TREES.values():
            decoder = SpeculativeDecoder(target_on_gpu, draft, tree=tree, **sizes)
            assert exact.answers(decoder, requests) == expected
            assert decoder._graph is not None
            assert sum(decoder.record().accepted[0][1:]) > 0, "nothing was accepted, so nothing was tested"


@pytest.mark.gpu
@needs_weights
def test_drafter_invariant_text_depends_on_no_draft_and_no_tree(target_on_gpu, prompts_on_gpu):
    params = SamplingParams(temperature=1.0, top_p=0.95)
    requests = [
        Request(prompt, NUM_TOKENS, params, seed=seed, eos_token_ids=(2,))
        for seed, prompt in enumerate(prompts_on_gpu[:24])
    ]
    sizes = {"rule": Rule.DRAFTER_INVARIANT, "capacity": CAPACITY}

    def say(decoder, step):
        return [text for n in range(0, 24, step) for text in texts(decoder, requests[n : n + step])]

    expected = say(SpeculativeDecoder(target_on_gpu, None, **sizes), 1)
    for name in miniature.DRAFTS:
        draft = miniature.load_draft(name, torch.bfloat16, "cuda")
        for tree in (DraftTree.chain(3), *exact.TREES.values()):
            for batch_size in (1, 8):
                decoder = SpeculativeDecoder(target_on_gpu, draft, tree=tree, batch_size=batch_size, **sizes)
                assert say(decoder, batch_size) == expected, (name, tree, batch_size)
    reseeded = [replace(request, seed=request.seed + 1000) for request in requests[:1]]
    assert texts(SpeculativeDecoder(target_on_gpu, None, **sizes), reseeded) != expected[:1]


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["small", pytest.param("llava7b", marks=pytest.mark.slow)])
def test_planted_models_of_given_shapes_say_what_plain_decoding_says(target):
    """``python -m bench exact`` writes down the same for LLaVA-1.5-7B: 104 prompts of 128 tokens."""
    *_, tokens = exact.SIZES.get(target, exact.SMALL_SIZES)
    for row in exact.measure(Setup(read_bandwidth=1.0, target=target)):
        assert row["divergences"] == [], row
        assert row["equal_prompts"] == row["prompts"], row
        assert row["equal_logits"] == row["equal_tokens"] == row["tokens"] == tokens * row["prompts"], row


# The other LLaVA-shaped families

CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GRID = [[16, 32], [32, 16], [32, 32]]


def text(kind, **more):
    return kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **more,
    )


def clip_model(config, model, vision=CLIPVisionConfig, language=LlamaConfig, **more):
    return model(config(vision_config=vision(**CLIP), text_config=text(language), image_token_id=3, **more))


def internvl():
    vision = InternVLVisionConfig(**{**CLIP, "image_size": [16, 16], "patch_size": [4, 4]})
    config = InternVLConfig(
        vision_config=vision, text_config=text(Qwen2Config), image_token_id=3, downsample_ratio=0.5
    )
    return InternVLForConditionalGeneration(config)


def mistral3():
    vision = PixtralVisionConfig(**{**CLIP, "image_size": 32, "patch_size": 4, "head_dim": 8})
    config = Mistral3Config(
        vision_config=vision,
        text_config=text(MistralConfig, sliding_window=None),
        image_token_index=3,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration(config)


FAMILIES = {
    "llava on siglip and qwen2": lambda: clip_model(
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
        Qwen2Config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "vipllava": lambda: clip_model(
        VipLlavaConfig, VipLlavaForConditionalGeneration, vision_feature_layers=[-1, -2]
    ),
    "llava_next": lambda: clip_model(
        LlavaNextConfig, LlavaNextForConditionalGeneration, vision_feature_layer=-1, image_grid_pinpoints=GRID
    ),
    "llava_onevision": lambda: clip_model(
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        SiglipVisionConfig,
        Qwen2Config,
        video_token_id=4,
        vision_feature_layer=-1,
        image_grid_pinpoints=GRID,
    ),
    "internvl": internvl,
    "mistral3": mistral3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family(family):
    torch.manual_seed(0)
    target = sharpen(FAMILIES[family]().eval())
    pixels = torch.randn(2, 3, 16, 16)
    sizes = {}
    if family in ("llava_next", "llava_onevision"):
        pixels, sizes = torch.randn(2, 5, 3, 16, 16), {"image_sizes": torch.tensor([[32, 32], [32, 24]])}
    elif family == "mistral3":
        sizes = {"image_sizes": torch.tensor([[16, 16], [16, 16]])}
    features = target.model.get_image_features(pixels, **sizes, return_dict=True).pooler_output
    rows = [
        torch.tensor([1, *[3] * len(image), *question])
        for image, question in zip(features, ([9, 8, 7], [19, 18, 17, 16]), strict=True)
    ]
    inputs = {**left_padded(rows), "pixel_values": pixels, **sizes}
    if family == "llava_onevision":
        inputs["batch_num_images"] = torch.ones(2, dtype=torch.int64)
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=12)
    for draft in (tiny_llama(), "ngram") if sizes else (tiny_llama(), "ngram", target):
        got = fastspec.generate(target, draft=draft, gamma=3, **inputs, do_sample=False, max_new_tokens=12)
        assert torch.equal(got, expected)
    if sizes:
        cut = r"a draft that cuts images into tiles is not supported, got model_type"
        with pytest.raises(ValueError, match=cut):
            fastspec.generate(target, draft=target, **inputs, max_new_tokens=4)
