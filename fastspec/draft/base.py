"""What the decoder asks of a draft."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from fastspec.model.vision import Prompt
from fastspec.state import DecodeState
from fastspec.tree import DraftTree
from fastspec.verification import Rule


class Draft(ABC):
    """Proposes the tokens of a tree. It may be anything: the law of the output never depends on it."""

    #: Whether it knows no law q of its tokens, so that only target-only verification is exact.
    deterministic: bool = False
    #: Whether it can only propose chains.
    chains_only: bool = False
    #: Whether :meth:`propose` leaves all decisions to the device, so that a CUDA graph can hold it, whatever the
    #: sampling parameters.
    capturable: bool = False
    #: Bytes of weights that one of its passes reads.
    num_bytes: int = 0

    @abstractmethod
    def allocate(
        self,
        batch_size: int,
        capacity: int,
        tree: DraftTree,
        vocab_size: int,
        rule: Rule,
        device: torch.device,
    ) -> None:
        """Makes its buffers.

        Args:
            batch_size: sequences drafted together.
            capacity: most committed tokens of a sequence.
            tree: the shape of what it proposes.
            vocab_size: the target's vocabulary.
            rule: how its tokens will be accepted, which decides how they are best drawn.
            device: where the decoder's state is.
        """

    def attach(self, target: nn.Module) -> None:  # noqa: B027, most drafts do not care who the target is
        """Told of the target before its prompts are encoded, so that work can be shared."""

    def check(self, prompt: Prompt) -> None:  # noqa: B027, most drafts read every prompt
        """Raises ValueError, before any work, for a prompt it could not read."""

    @abstractmethod
    def prefill(self, row: int, prompt: Prompt) -> None:
        """Reads the prompt of one sequence; the first token of the answer comes with the first cycle."""

    @abstractmethod
    def propose(self, state: DecodeState) -> None:
        """Writes ``state.tree_tokens`` below the root and, unless deterministic, ``state.draft_logits``."""
