"""Prompt lookup: the continuation of the last earlier occurrence of the newest tokens, no model at all."""

from __future__ import annotations

import torch

from fastspec.draft.base import Draft
from fastspec.model.vision import Prompt
from fastspec.state import DecodeState
from fastspec.tree import DraftTree
from fastspec.verification import Rule


class NgramDraft(Draft):
    """Copies what followed the longest recent match within the sequence itself (Saxena 2023, prompt lookup).

    Args:
        max_ngram: longest match tried, in tokens.

    Raises:
        ValueError: if ``max_ngram`` is below 1.
    """

    deterministic = True
    chains_only = True
    capturable = True

    def __init__(self, max_ngram: int = 3):
        if max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {max_ngram}")
        self.max_ngram = max_ngram

    def allocate(
        self,
        batch_size: int,
        capacity: int,
        tree: DraftTree,
        vocab_size: int,
        rule: Rule,
        device: torch.device,
    ) -> None:
        self._image_token_ids = torch.full((batch_size, 1), -1, device=device)

    def prefill(self, row: int, prompt: Prompt) -> None:
        self._image_token_ids[row].fill_(prompt.image_token_id)

    def propose(self, state: DecodeState) -> None:
        tokens, length = state.tokens, state.num_tokens[:, None]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        image = self._image_token_ids

        # matched[b, i]: how many tokens ending at i equal as many ending at the root, up to max_ngram.
        matched = torch.zeros_like(tokens)
        unbroken = torch.ones_like(tokens, dtype=torch.bool)
        for back in range(self.max_ngram):
            wanted = tokens.gather(1, (length - 1 - back).clamp(min=0))
            candidate = tokens.roll(back, dims=1)
            inside = (places >= back) & (length > back) & (wanted != image)
            unbroken = unbroken & inside & (candidate == wanted)
            matched += unbroken
        score = torch.where(places < length - 1, matched * tokens.shape[1] + places, 0)
        score = torch.where(matched > 0, score, 0)
        best = score.argmax(1, keepdim=True)
        found = score.gather(1, best) > 0

        follow = best + 1 + torch.arange(state.tree.max_depth, device=tokens.device)
        proposal = tokens.gather(1, follow.clamp(max=tokens.shape[1] - 1))
        usable = found & (follow < length) & (proposal != image)
        state.tree_tokens[:, 1:] = torch.where(usable.cumprod(1).bool(), proposal, -1)
