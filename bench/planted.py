"""``python -m bench.planted --out DIR --agreement 0.8``: a target and a draft of true shapes whose law is known.

The models are LLaVA and LLaMA of transformers, with weights that are made rather than trained, so that every
engine can be timed on the same work at any acceptance. The law is that of :class:`bench.law.PlantedLaw`.

Embeddings have unit root mean square and three orthogonal parts: one direction common to all tokens, a direction
of the token's class, and noise of the token's own. The output projection reads the class against the common
direction, so the logit of a successor is the logarithm of its probability, and that of any other token is low enough
that all of them together have a mass of e⁻¹⁰. All layers are random; together they change a hidden state by at most
a tenth, which moves the law little but costs what real layers cost.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
)

from bench.law import FIRST_TEXT_TOKEN, PlantedLaw
from bench.shapes import DRAFTS, TARGETS, draft_config, target_config
from fastspec.miniature.models import new_processor
from fastspec.model.vision import text_stack

MAX_CLASSES = 256
#: Share of an embedding's length along the common direction, and along that of its class.
COMMON, CLASS = 0.25, 0.7
#: How much the residual branches change a hidden state, all together and at most.
RESIDUAL = 0.1
#: Minus the logarithm of the mass of all tokens that do not follow.
REST = 10.0


def planted_pair(
    target: str = "llava7b",
    draft: str | None = None,
    agreement: float = 0.8,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlamaForCausalLM, PlantedLaw]:
    """A target and a draft in memory, and their law. Takes seconds on a GPU.

    Args:
        target, draft: names of :mod:`bench.shapes`; the draft is the target's usual one unless given.
        agreement: expected acceptance at temperature 1, and the rate of matching greedy choices, in [0, 1].
        device: where the models are made.
        dtype: of their weights.
        seed: of table and weights; the target does not depend on the agreement.

    Raises:
        ValueError: for an unknown name or an agreement outside [0, 1].
    """
    law = planted_law(target, draft, agreement, seed)
    return planted_target(target, law, device, dtype), planted_draft(target, draft, law, device, dtype), law


def planted_law(target: str, draft: str | None = None, agreement: float = 0.8, seed: int = 0) -> PlantedLaw:
    """The law of a pair without its models; see :func:`planted_pair`."""
    config = target_config(target)
    text = config.text_config
    narrowest = min(text.hidden_size, draft_config(draft or TARGETS[target], config).hidden_size)
    num_text_tokens = config.image_token_id - FIRST_TEXT_TOKEN
    num_classes = min(MAX_CLASSES, narrowest // 4, num_text_tokens // 8)
    return PlantedLaw(text.vocab_size, num_classes, agreement, num_text_tokens, seed)


def planted_target(
    name: str, law: PlantedLaw, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> LlavaForConditionalGeneration:
    """The target of a pair; its vision tower is as transformers initialises it."""
    return _plant(AutoModelForImageTextToText, target_config(name), law, False, device, dtype, seed)


def planted_draft(
    target: str,
    name: str | None,
    law: PlantedLaw,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 1,
) -> LlamaForCausalLM:
    """The draft of a pair."""
    config = draft_config(name or TARGETS[target], target_config(target))
    return _plant(AutoModelForCausalLM, config, law, True, device, dtype, seed)


@torch.no_grad()
def _plant(
    kind: type,
    config: PretrainedConfig,
    law: PlantedLaw,
    draft: bool,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
) -> nn.Module:
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            model = kind.from_config(config, dtype=dtype).eval()
        text, head = text_stack(model)
        _fill_layers(text)
        embedding, projection = _embedding_and_projection(law, text.config.hidden_size, draft, device)
        text.embed_tokens.weight.copy_(embedding)
        head.weight.copy_(projection)
    ids = config.get_text_config()
    model.generation_config = GenerationConfig(
        bos_token_id=ids.bos_token_id, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    return model


def _fill_layers(text: nn.Module) -> None:
    branch = RESIDUAL / math.sqrt(2 * len(text.layers))
    for layer in text.layers:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                scale = branch if name.endswith(("o_proj", "down_proj")) else 1.0
                module.weight.normal_(std=scale / math.sqrt(module.in_features))


def _embedding_and_projection(
    law: PlantedLaw, width: int, draft: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[V, hidden]`` each, in float32."""
    basis = torch.linalg.qr(torch.randn(width, width, device=device)).Q
    shared = 1 + law.num_classes
    own = math.sqrt((1 - COMMON**2 - CLASS**2) / (width - shared))

    parts = torch.zeros(law.vocab_size, width, device=device)
    parts[:, 0] = COMMON
    parts.scatter_(1, 1 + law.class_of[:, None].to(device), CLASS)
    parts[:, shared:].normal_(std=own)
    embedding = math.sqrt(width) * parts @ basis

    # logit = -floor + [class matches] (floor + ln p) = ln p: small numbers, which a narrow dtype holds well.
    floor = REST + math.log(law.vocab_size)
    reads = torch.zeros(law.vocab_size, shared)
    reads[:, 0] = -floor / COMMON
    probabilities = law.probabilities(draft)
    classes, slots = probabilities.nonzero(as_tuple=True)
    values = (floor + probabilities[classes, slots].log()) / CLASS
    reads[law.successors[classes, slots], 1 + classes] = values.float()
    reads = reads.to(device)
    return embedding, reads @ basis[:shared] / math.sqrt(width)


def planted_processor(config: LlavaConfig) -> LlavaProcessor:
    """LLaVA's processor, with a tokenizer that writes token 17 as ``t17``."""
    image, text, vision = config.image_token_id, config.text_config, config.vision_config
    names = {0: "<unk>", text.bos_token_id: "<s>", text.eos_token_id: "</s>"}
    names |= {image: "<image>", text.pad_token_id: "<pad>"}
    vocabulary = {names.get(token, f"t{token}"): token for token in range(text.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", text.bos_token_id)]
    )
    return new_processor(
        words, vision.image_size, vision.patch_size, text.max_position_embeddings, chat_template=None
    )


def write_pair(
    out: Path,
    target: str = "llava7b",
    draft: str | None = None,
    agreement: float = 0.8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PlantedLaw:
    """Writes ``out/target`` and ``out/draft`` for ``from_pretrained``; see :func:`planted_pair`."""
    target_model, draft_model, law = planted_pair(target, draft, agreement, device, dtype, seed)
    processor = planted_processor(target_model.config)
    target_model.save_pretrained(out / "target")
    processor.save_pretrained(out / "target")
    draft_model.save_pretrained(out / "draft")
    processor.tokenizer.save_pretrained(out / "draft")
    return law


def main(arguments: list[str] | None = None) -> None:
    """Writes a pair as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench.planted", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder that gets target/ and draft/")
    parser.add_argument("--agreement", type=float, default=0.8, help="expected acceptance, 0 to 1")
    parser.add_argument("--target", choices=list(TARGETS), default="llava7b")
    parser.add_argument("--draft", choices=list(DRAFTS), help="the target's usual one unless given")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if not 0 <= given.agreement <= 1:
        parser.error(f"--agreement must be in [0, 1], got {given.agreement}")
    law = write_pair(
        given.out,
        given.target,
        given.draft,
        given.agreement,
        given.device,
        getattr(torch, given.dtype),
        given.seed,
    )
    print(f"written: {given.out / 'target'} and {given.out / 'draft'}, agreement {law.agreement:.4f}")


if __name__ == "__main__":
    main()
