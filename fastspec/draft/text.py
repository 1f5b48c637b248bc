"""The language-only draft of the paper: it reads the prompt without its image, at its own compact positions."""

from __future__ import annotations

import torch
from torch import nn

from fastspec.draft.base import Draft
from fastspec.model.cache import CacheView
from fastspec.model.transformer import DecodeTransformer, check_text_model
from fastspec.model.vision import Prompt, text_stack
from fastspec.ops import Proposer
from fastspec.state import DecodeState
from fastspec.tree import DraftTree
from fastspec.verification import Rule


class TextDraft(Draft):
    """A LLaMA-shaped language model as draft.

    Its cache holds committed tokens only. The first pass of a cycle reads the tokens that the last cycle
    committed (up to D + 1 rows, which cost no more than one), so nothing needs to be kept or moved after
    verification; the passes below the root put their rows after the committed ones, where the next cycle
    overwrites them.

    Args:
        model: a transformers causal language model.

    Raises:
        ValueError: for an architecture that is not supported.
    """

    def __init__(self, model: nn.Module):
        check_text_model(model.config.get_text_config())
        self.transformer = DecodeTransformer(*text_stack(model))
        self.num_bytes = self.transformer.num_bytes

    def allocate(
        self,
        batch_size: int,
        capacity: int,
        tree: DraftTree,
        vocab_size: int,
        rule: Rule,
        device: torch.device,
    ) -> None:
        window = tree.max_depth + 1
        self._tree = tree
        self._proposer = Proposer(tree, batch_size, vocab_size, rule, device)
        self._cache = self.transformer.new_cache(batch_size, capacity + window + len(tree.inner))
        self._length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._window = torch.arange(window, device=device)
        self._causal = torch.ones(window, window, dtype=torch.bool, device=device).tril()
        self._inner = tree.on(device).inner
        self._mask = tree.on(device).mask[self._inner[1:]][:, self._inner[1:]]

    def prefill(self, row: int, prompt: Prompt) -> None:
        embeddings = self.prompt_embeddings(prompt)
        if len(embeddings):
            self.transformer.prefill(embeddings, self._cache, row)
        self._length[row] = len(embeddings)

    def prompt_embeddings(self, prompt: Prompt) -> torch.Tensor:
        """``[T, hidden]`` of what the draft sees of the prompt."""
        return self.transformer.embed(prompt.text_ids)

    def propose(self, state: DecodeState) -> None:
        hidden = self._read_committed(state)
        for level, nodes in enumerate(self._tree.levels):
            if level > 0:
                hidden = self._read_level(state, level, nodes)
            self._proposer(
                self.transformer.logits(hidden),
                level,
                state.tree_tokens,
                state.draft_logits,
                state.draft_sampling,
                state.num_tokens,
            )

    def _read_committed(self, state: DecodeState) -> torch.Tensor:
        """Catches up with the tokens of the last cycle; returns the root's hidden state, ``[B, 1, hidden]``."""
        num_new = state.num_new.clamp(min=1)
        places = state.num_tokens[:, None] - num_new[:, None] + self._window
        embeddings = self.transformer.embed(state.tokens.gather(1, places))
        positions = self._length[:, None] + self._window
        hidden = self.transformer.forward(
            embeddings, positions, self._cache, CacheView(self._length.clone(), self._causal)
        )
        self._length += state.num_new
        last = (num_new - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, last)

    def _read_level(self, state: DecodeState, level: int, nodes: tuple[int, ...]) -> torch.Tensor:
        """One pass over the inner nodes of a level, ``[B, R, hidden]``."""
        first = self._tree.inner_index[nodes[0]] - 1
        last = first + len(nodes)
        embeddings = self.transformer.embed(state.tree_tokens[:, self._inner[first + 1 : last + 1]])
        positions = (self._length - 1 + level)[:, None].expand(-1, len(nodes))
        view = CacheView(self._length, self._mask[first:last, :last], first_slot=first)
        return self.transformer.forward(embeddings, positions, self._cache, view)
