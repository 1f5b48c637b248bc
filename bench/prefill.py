"""How long does the first token take, from pixels on the GPU, beside transformers?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.ceilings import product_rate
from bench.report import result_row
from bench.setup import Setup
from bench.timing import Timing, elapsed, summary
from fastspec.decoder import Request, SpeculativeDecoder
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import Prompt, encode_images
from fastspec.ops.causal_attention import flash_choices
from fastspec.sampling import SamplingParams

TEXT_TOKENS = 64


@torch.no_grad()
def measure(setup: Setup) -> list[dict]:
    """Rows ``prefill/<target>/image<n>+text64/<part>``; the floor is that of the products alone.

    The part ``transformer`` takes the attention that fastspec takes. Where a flash-attn runs, ``transformer_flash4``
    and the like beside ``transformer_sdpa`` tell what each brings.
    """
    model, transformer = setup.target_model, setup.transformer
    config = model.config
    side, image = config.vision_config.image_size, config.image_seq_length
    prompt = setup.prompt(image + TEXT_TOKENS)
    ids = prompt.input_ids
    pixels = torch.randn(1, 3, side, side, device=setup.device).to(setup.dtype)
    decoder = SpeculativeDecoder(model, None, capacity=len(ids) + 8)
    greedy = SamplingParams(temperature=0.0)

    def first_token() -> None:
        features = encode_images(model, {"pixel_values": pixels})
        seen = Prompt(ids, config.image_token_id, features, checked=True)
        decoder.prefill([Request(seen, max_new_tokens=1, params=greedy)])

    def transformers() -> None:
        model(input_ids=ids[None], pixel_values=pixels, logits_to_keep=1).logits.argmax(-1)

    embeddings = prompt.embeddings(transformer)
    calls = {
        "first_token": first_token,
        "vision": lambda: encode_images(model, {"pixel_values": pixels}),
        "transformer": lambda: transformer.prefill(embeddings, decoder.cache, 0),
        "transformers_eager": transformers,
    }
    attentions = _attentions(transformer, calls["transformer"])
    timings = _taking_turns(calls | attentions, setup.samples)
    rate = product_rate(setup.dtype)
    matrices = [
        module for module in model.model.vision_tower.modules() if isinstance(module, torch.nn.Linear)
    ]
    work = {
        "vision": 2 * (image + 1) * sum(module.weight.numel() for module in matrices),
        "transformer": 2
        * len(ids)
        * (transformer.num_bytes - transformer.lm_head.nbytes)
        / setup.dtype.itemsize,
    }
    work["first_token"] = sum(work.values())
    work |= dict.fromkeys(attentions, work["transformer"])
    name = f"prefill/{setup.target}/image{image}+text{TEXT_TOKENS}"
    return [
        *(
            result_row(
                f"{name}/{part}",
                timings[part],
                floor=operations / rate * 1e6,
                others={"transformers_eager": timings["transformers_eager"]}
                if part == "first_token"
                else None,
                unit="ms",
            )
            for part, operations in work.items()
        ),
        result_row(f"baseline/{name}/transformers_eager", timings["transformers_eager"], unit="ms"),
    ]


def _attentions(transformer: DecodeTransformer, prefill: Callable) -> dict[str, Callable]:
    """The prefill by each attention, however long the prompt, where there is more than PyTorch's."""
    choices = flash_choices(transformer.device, transformer.dtype, transformer.head_dim)
    usual = list(choices)
    choices[:] = [flash._replace(least_tokens=0) for flash in usual]
    prefill()  # takes out of the choices what does not run
    running = list(choices)
    choices[:] = [flash for flash in usual if flash._replace(least_tokens=0) in running]
    usual = list(choices)

    def by(attentions: list) -> Callable:
        def run() -> None:
            choices[:] = attentions
            prefill()
            choices[:] = usual

        return run

    ways = {flash.name.replace("flash-attn ", "flash"): [flash] for flash in running}
    if ways:
        ways["sdpa"] = []
    return {f"transformer_{name}": by(attentions) for name, attentions in ways.items()}


def _taking_turns(calls: dict[str, Callable], samples: int) -> dict[str, Timing]:
    """Each launched by itself, host work included: prompts differ in length, so no graph holds them."""
    times = {name: [] for name in calls}
    for sample in range(samples + 3):
        for name, call in calls.items():
            microseconds = elapsed(call)
            if sample >= 3:
                times[name].append(microseconds)
    return {name: summary(values) for name, values in times.items()}
