"""What all benchmarks of a run share: the measured ceiling, the planted models, prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from bench.law import FIRST_TEXT_TOKEN
from bench.planted import planted_draft, planted_law, planted_target
from bench.shapes import TARGETS, target_config
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import Prompt, text_stack


@dataclass
class Setup:
    """One run of benchmarks.

    Attributes:
        read_bandwidth: bytes per second of a pure read, measured in the same run.
        quick: fewer rows and samples.
        target, draft: names of :mod:`bench.shapes`; the draft is the target's usual one unless given.
        device, dtype: where and in what the models are: bfloat16 on a GPU.
    """

    read_bandwidth: float
    quick: bool = False
    target: str = "llava7b"
    draft: str = ""
    device: torch.device = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        self.draft = self.draft or TARGETS[self.target]
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.dtype = torch.bfloat16 if on_gpu else torch.float32

    @property
    def pair(self) -> str:
        """The models' names in those of rows."""
        return f"{self.target}+{self.draft}"

    @property
    def samples(self) -> int:
        """How often things that take milliseconds are timed."""
        return 10 if self.quick else 40

    @property
    def context(self) -> int:
        """Committed tokens of a sequence, its image included."""
        return 700 if self.target == "llava7b" else 24

    @cached_property
    def config(self) -> LlavaConfig:
        """The target's."""
        return target_config(self.target)

    @cached_property
    def target_model(self) -> LlavaForConditionalGeneration:
        """The planted target, made once."""
        law = planted_law(self.target, self.draft)
        return planted_target(self.target, law, self.device, self.dtype)

    @cached_property
    def transformer(self) -> DecodeTransformer:
        """The target's text model as fastspec runs it."""
        return DecodeTransformer(*text_stack(self.target_model))

    def draft_model(self, agreement: float) -> LlamaForCausalLM:
        """A draft that agrees with the target so much."""
        law = planted_law(self.target, self.draft, agreement)
        return planted_draft(self.target, self.draft, law, self.device, self.dtype)

    def floor(self, num_bytes: float) -> float:
        """Microseconds that reading so many bytes takes at least."""
        return num_bytes / self.read_bandwidth * 1e6

    def text_ids(self, count: int, seed: int = 0) -> torch.Tensor:
        """``[count]`` random tokens of the law."""
        generator = torch.Generator().manual_seed(seed)
        last = self.config.image_token_id
        return torch.randint(FIRST_TEXT_TOKEN, last, (count,), generator=generator).to(self.device)

    def prompt(self, num_tokens: int, seed: int = 0) -> Prompt:
        """A prompt with one image whose features are random, so many tokens long in all."""
        config = self.config
        image = config.image_seq_length
        generator = torch.Generator(self.device).manual_seed(seed)
        features = torch.randn(
            image, config.text_config.hidden_size, generator=generator, device=self.device
        ).to(self.dtype)
        ids = torch.full((num_tokens,), config.image_token_id, device=self.device)
        ids[0] = config.text_config.bos_token_id
        ids[1 + image :] = self.text_ids(num_tokens - 1 - image, seed)
        return Prompt(ids, config.image_token_id, (features,))


def kv_bytes(transformer: DecodeTransformer, context: int) -> int:
    """Bytes of keys and values that a pass reads of one sequence."""
    width = transformer.num_layers * transformer.num_kv_heads * transformer.head_dim
    return 2 * context * width * transformer.dtype.itemsize
