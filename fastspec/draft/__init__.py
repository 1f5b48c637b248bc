"""Drafts: anything that proposes tokens. The law of the output never depends on which."""

from __future__ import annotations

from torch import nn

from fastspec.draft.base import Draft
from fastspec.draft.compact import CompactDraft, CompactLlamaForCausalLM
from fastspec.draft.image import ImageDraft
from fastspec.draft.ngram import NgramDraft
from fastspec.draft.text import TextDraft
from fastspec.model.vision import MULTIMODAL_MODELS, is_multimodal

__all__ = [
    "CompactDraft",
    "CompactLlamaForCausalLM",
    "Draft",
    "ImageDraft",
    "NgramDraft",
    "TextDraft",
    "make_draft",
]


def make_draft(draft: object) -> Draft:
    """A draft from what the user passes: a transformers model, ``"ngram"``, or a :class:`Draft` of their own.

    Raises:
        TypeError: if there is none, or it is something else.
        ValueError: for a model of an unsupported architecture.
    """
    if isinstance(draft, Draft):
        return draft
    if isinstance(draft, str) and draft == "ngram":
        return NgramDraft()
    if is_multimodal(draft):
        return ImageDraft(draft)
    if isinstance(draft, CompactLlamaForCausalLM):
        return CompactDraft(draft)
    if isinstance(draft, nn.Module) and hasattr(draft, "lm_head") and hasattr(draft, "config"):
        return TextDraft(draft)
    given = "none" if draft is None else repr(draft) if isinstance(draft, str) else type(draft).__name__
    raise TypeError(
        "draft must be a causal language model of transformers, a LLaVA-shaped model "
        f"({', '.join(MULTIMODAL_MODELS)}) or 'ngram', got {given}"
    )
