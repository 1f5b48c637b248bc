"""The language-only draft of the paper: it reads the prompt without its image, at its own compact positions."""

from __future__ import annotations

import torch
from torch import nn

from fastspec.draft.base import Draft
from fastspec.model.passes import tree_pass
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
        self.capturable = self._proposer.backend != "reference"
        self._cache = self.transformer.new_cache(batch_size, capacity + window + len(tree.inner))
        self._length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        inner = tree.on(device).inner
        causal = torch.ones(window, window, dtype=torch.bool, device=device).tril()
        below_root = tree.on(device).mask[inner[1:]][:, inner[1:]]
        self._read_committed = tree_pass(self.transformer, self._cache, causal)
        self._levels = []
        for nodes in tree.levels[1:]:
            first = tree.inner_index[nodes[0]] - 1
            last = first + len(nodes)
            read = tree_pass(self.transformer, self._cache, below_root[first:last, :last], first)
            self._levels.append((inner[first + 1 : last + 1], read))

    def prefill(self, row: int, prompt: Prompt) -> None:
        embeddings = self.prompt_embeddings(prompt)
        if len(embeddings):
            self.transformer.prefill(embeddings, self._cache, row)
        self._length[row].fill_(len(embeddings))

    def prompt_embeddings(self, prompt: Prompt) -> torch.Tensor:
        """``[T, hidden]`` of what the draft sees of the prompt."""
        return self.transformer.embed(prompt.text_ids)

    def propose(self, state: DecodeState) -> None:
        # A finished sequence commits nothing; its pass reads its own first row again.
        last = state.num_new.clamp(min=1) - 1
        logits = self._read_committed(state.new_tokens, self._length, last)
        self._length += state.num_new
        for level in range(self._tree.max_depth):
            if level > 0:
                nodes, read = self._levels[level - 1]
                logits = read(state.tree_tokens[:, nodes], self._length)
            self._proposer(
                logits,
                level,
                state.tree_tokens,
                state.draft_logits,
                state.draft_sampling,
                state.num_tokens,
            )
