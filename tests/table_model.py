"""Models whose law is a table: the production cycle at full speed, thousands of sequences at once."""

from __future__ import annotations

import torch

from fastspec import DraftTree
from fastspec.decoder import SpeculativeDecoder
from fastspec.draft import TextDraft
from fastspec.model.cache import StaticCache
from fastspec.sampling import SamplingParams
from fastspec.state import FinishReason
from fastspec.verification import Rule


class TableTransformer:
    """The interface of DecodeTransformer; logits are a function of the last token and its position.

    Args:
        logits: ``[positions, V, V]``, by position of the last token and its id.
    """

    def __init__(self, logits: torch.Tensor):
        self.table = logits
        self.device, self.dtype = logits.device, logits.dtype
        self.vocab_size = logits.shape[-1]
        self.max_positions = logits.shape[0]
        self.num_bytes = logits.numel()
        self.lm_head = logits

    def new_cache(self, batch_size: int, capacity: int) -> StaticCache:
        return StaticCache(0, batch_size, 1, capacity, 2, torch.float32, self.device)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids.clamp(min=0)[..., None].to(self.dtype)

    def prefill(self, embeddings, cache, sequence):
        positions = torch.arange(len(embeddings), device=self.device)[:, None].to(self.dtype)
        return torch.cat([embeddings, positions], dim=-1)

    def forward(self, embeddings, positions, cache, view):
        return torch.cat([embeddings, positions[..., None].to(self.dtype)], dim=-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        token, position = hidden.long().unbind(-1)
        return self.table[position.clamp(max=len(self.table) - 1), token]


class TableDraft(TextDraft):
    """The production text draft over a table."""

    def __init__(self, logits: torch.Tensor):
        self.transformer = TableTransformer(logits)
        self.num_bytes = self.transformer.num_bytes


def table_decoder(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    tree: DraftTree,
    rule: Rule,
    batch_size: int,
    launch: str = "ahead",
) -> SpeculativeDecoder:
    """A SpeculativeDecoder over tables, for any batch size."""
    self = SpeculativeDecoder.__new__(SpeculativeDecoder)
    self.target = TableTransformer(target)
    self.draft = None if draft is None else TableDraft(draft)
    self.tree, self.rule, self.launch = tree, rule, launch
    self._allocate(batch_size, len(target))
    return self


def sample_tokens(
    decoder: SpeculativeDecoder, num_tokens: int, params: SamplingParams, first_seed: int
) -> torch.Tensor:
    """The first tokens of one answer per sequence, each with its own seed: ``[B, num_tokens]``."""
    state = decoder.state
    device = state.tokens.device
    prompt = torch.zeros(1, dtype=torch.int64, device=device)
    state.clear()
    state.admit(0, prompt, 1 + num_tokens, params, params, 0, ())
    for tensors in (state.sampling, state.draft_sampling):
        tensors.fill(params)
    state.sampling.seen[:] = state.sampling.seen[:1]
    state.tree_tokens[:, 0] = 0
    state.tokens[:, 0] = 0
    state.max_tokens[:] = 1 + num_tokens
    state.reason[:] = FinishReason.RUNNING
    state.sampling.seed[:] = torch.arange(first_seed, first_seed + decoder.batch_size, device=device)
    if decoder.draft is not None:
        decoder.draft._length[:] = 1
    first = decoder.target.table[0, 0].repeat(decoder.batch_size, 1, 1)
    decoder._accept(first, DraftTree.chain(0), first=True)
    for _ in range(num_tokens):
        if not (state.reason == FinishReason.RUNNING).any():
            break
        decoder.cycle()
    return state.tokens[:, 1 : 1 + num_tokens]
