"""The shapes of the miniature's models, its processor, and how they are kept on disk."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from fastspec.training.sizes import SIZES, new_llama

from .scenes import PATCH, SIDE
from .tokens import BOS, CHAT_TEMPLATE, EOS, IMAGE, IMAGE_TOKENS, PAD, VOCABULARY

_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def new_target() -> LlavaForConditionalGeneration:
    """LLaVA-1.5 in small, 7.9 M parameters: CLIP 6 x 192 on 96 px in patches of 8, LLaMA 6 x 256."""
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=3,
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        **_IDS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=IMAGE_TOKENS,
        # Unlike LLaVA-1.5's -2: a tower of six layers has none to throw away.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **_IDS,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**_IDS)
    # CLIP's own start leaves places near zero, where the patches drown them, and shapes are slow to be told.
    places = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        places[1:] = 0.4 * _waves(SIDE // PATCH, places.shape[1])
    return model


def _waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, width]."""
    steps = (torch.arange(side) + 0.5)[:, None] * math.pi * torch.arange(1, width // 4 + 1) / (width // 4)
    line = torch.cat([steps.sin(), steps.cos()], dim=1)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def new_draft() -> LlamaForCausalLM:
    """A text-only LLaMA of 0.17 M parameters."""
    return new_llama(SIZES["tiny"], VOCABULARY, 1024, **_IDS)


def wrap_tokenizer(
    tokenizer: Tokenizer, max_length: int = 1024, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def new_processor(
    tokenizer: Tokenizer,
    side: int = SIDE,
    patch_size: int = PATCH,
    max_length: int = 1024,
    chat_template: str | None = CHAT_TEMPLATE,
) -> LlavaProcessor:
    """LLaVA-1.5's processor: resized to `side` px on the short side, cut to a square, normalised as for CLIP."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=wrap_tokenizer(tokenizer, max_length, chat_template),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
        image_token="<image>",
    )


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_replaceable(folder: Path, mark: str) -> None:
    """Raise ValueError for what `replace_folder` must not replace: all but an empty folder or one with that file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder, {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise ValueError(
            f"--out {folder} has files, which would be lost, and no {mark} of an earlier run: choose another folder"
        )


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder, then put it in the place of `folder` in one move."""
    fresh = folder.with_name(f".{folder.name}.new.{os.getpid()}")
    stale = folder.with_name(f".{folder.name}.old.{os.getpid()}")

    def tidy() -> None:
        if stale.exists() and not folder.exists():
            stale.rename(folder)  # whatever came between the two moves, one of both stays
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)

    tidy()  # in a container a process often has the number of the one that was killed
    fresh.mkdir(parents=True)
    try:
        fill(fresh)
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    except SafetensorError as error:  # a full disk in safetensors' words
        raise OSError(f"cannot save {folder}: {error}") from error
    finally:
        tidy()


def save_companion(companion: LlavaProcessor | PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a processor or tokenizer, without the padding of its last call."""
    backend = getattr(companion, "tokenizer", companion).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    companion.save_pretrained(folder)


def save_model(
    model: torch.nn.Module, companion: LlavaProcessor | PreTrainedTokenizerFast, folder: Path
) -> None:
    """Half-precision safetensors that plain `from_pretrained` loads in single precision, and its companion."""

    def fill(fresh: Path) -> None:
        weights = {name: tensor.detach().cpu().half() for name, tensor in model.state_dict().items()}
        twin = type(model)(model.config).half()
        twin.load_state_dict(weights)
        twin.generation_config = model.generation_config
        twin.save_pretrained(fresh)
        save_companion(companion, fresh)
        path = fresh / "config.json"
        config = json.loads(path.read_text())
        for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
            if "dtype" in part:
                part["dtype"] = "float32"  # stored in half, meant to run in single
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    replace_folder(folder, fill)
