"""Tiny random models for tests that need shapes and laws rather than sense, and requests to them."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from fastspec.decoder import Request
from fastspec.generation import make_prompts

#: One layer of LLaVA-1.5-7B's text model.
LAYER_OF_7B = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
IMAGE_TOKEN_ID = 3
IMAGE_SIZE = 16
IMAGE_TOKENS = 4


def tiny_llava(
    vocab_size: int = 64, hidden_size: int = 32, layers: int = 2, seed: int = 0, **text: object
) -> LlavaForConditionalGeneration:
    """A random LLaVA with four tokens per 16 x 16 image; sharpened so that greedy choices have margins."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": vocab_size,
                "hidden_size": hidden_size,
                "intermediate_size": 2 * hidden_size,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
                **text,
            }
        ),
        image_token_id=IMAGE_TOKEN_ID,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    return sharpen(model)


def tiny_llama(
    vocab_size: int = 64, hidden_size: int = 16, seed: int = 1, **text: object
) -> LlamaForCausalLM:
    """A random text-only draft."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            **text,
        }
    )
    return sharpen(LlamaForCausalLM(config).eval())


def sharpen(model):
    """Random weights of a size that gives greedy choices margins."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.6 if "lm_head" in name or "embed_tokens" in name else 0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model


def picture_inputs(
    batch: int = 1, text_tokens: int = 8, images: int = 1, vocab_size: int = 64, seed: int = 0
) -> dict:
    """Inputs of prompts with images, as a processor would return them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        text = torch.randint(4, vocab_size, (text_tokens,), generator=generator)
        rows.append(torch.cat([torch.tensor([1] + [IMAGE_TOKEN_ID] * IMAGE_TOKENS * images), text]))
    inputs = {"input_ids": torch.stack(rows)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if images:
        inputs["pixel_values"] = torch.randn(batch * images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return inputs


def noisy_clone(model, noise: float = 0.05, seed: int = 3):
    """A draft that agrees with the model often but not always."""
    clone = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return clone


def left_padded(rows: list[torch.Tensor], pad_token_id: int = 0) -> dict:
    """``input_ids`` and ``attention_mask`` of prompts of different lengths."""
    length = max(len(row) for row in rows)
    ids = torch.stack(
        [torch.nn.functional.pad(row, (length - len(row), 0), value=pad_token_id) for row in rows]
    )
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows]
    )
    return {"input_ids": ids, "attention_mask": mask}


def gpu_pair(dtype=torch.float32):
    """A pair that PyTorch's operations run, or in bfloat16 one that the fused pass runs."""
    if dtype == torch.float32:
        return tiny_llava().to("cuda"), tiny_llama().to("cuda")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512}
    target = tiny_llava(hidden_size=256, **heads).to("cuda", dtype)
    return target, tiny_llama(hidden_size=256, **heads).to("cuda", dtype)


def requests_on(target, batch, params, tokens=20, first_seed=0):
    """Requests of so many tokens about random pictures, a seed for each."""
    inputs = {name: tensor.to(target.device) for name, tensor in picture_inputs(batch).items()}
    prompts = make_prompts(target, inputs["input_ids"], [0] * batch, inputs)
    return [
        Request(prompt, tokens, params, seed=first_seed + row, eos_token_ids=(2,))
        for row, prompt in enumerate(prompts)
    ]


def texts(decoder, requests, **kwargs):
    """What a decoder answers."""
    answers = [[] for _ in requests]
    for commitment in decoder.stream(requests, **kwargs):
        for answer, tokens in zip(answers, commitment.tokens, strict=False):
            answer += tokens
    return answers


def texts_on_streams(decoders, requests):
    """What decoders of one sequence answer, taking turns on a CUDA stream of their own each."""
    streams = [torch.cuda.Stream() for _ in decoders]
    answers = [[] for _ in decoders]
    generators = [decoder.stream(one) for decoder, one in zip(decoders, requests, strict=True)]
    running = set(range(len(decoders)))
    while running:
        for index in sorted(running):
            with torch.cuda.stream(streams[index]):
                commitment = next(generators[index], None)
            if commitment is None:
                running.remove(index)
            else:
                answers[index] += commitment.tokens[0]
    return [[answer] for answer in answers]


def random_causal_lm(config, dtype, device):
    """Random weights that keep activations near one; norms and biases away from their defaults."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
                else:
                    parameter.normal_(std=0.5 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.to(dtype)
