"""A next-token law that is known, and a draft's law that agrees with it as much as a dial says."""

from __future__ import annotations

import torch

#: Of a token's successors, the likeliest first; far enough apart that rounding does not change the order.
PROBABILITIES = (0.5, 0.25, 0.15, 0.1)
FIRST_TEXT_TOKEN = 3


class PlantedLaw:
    """What follows each token, for a target and for a draft.

    Tokens fall into K classes, and what follows a token depends on its class alone. The target's law p gives
    four successors the masses of ``PROBABILITIES``. The draft's law q mixes p with p', which gives the same
    masses to four other tokens: q = w p + (1 - w) p', so Σ min(p, q) = w. With agreement a,

    * in a K of the classes, w = 1 - (1 - a) / 3 ≥ 2/3, and both laws have the same likeliest token;
    * in the others, w = a / 3 ≤ 1/3, and the likeliest tokens differ.

    The likeliest token of p and of q always has at least twice the mass of any other. Averaged over the classes
    both the expected acceptance at temperature 1, Σ min(p, q), and the rate at which the greedy choices match
    are a. Sampling from p visits all classes equally often; greedy decoding visits each once before it comes
    back to the first.

    Args:
        vocab_size: V.
        num_classes: K.
        agreement: in [0, 1], rounded to a multiple of 1 / K. At 0 nothing is ever accepted, at 1 everything.
        num_text_tokens: tokens ``3 ... 3 + num_text_tokens - 1`` may follow; special ones never do.
        seed: of the table.

    Attributes:
        agreement: a, after rounding.
        class_of: ``[V]`` int64.
        successors: ``[K, 8]`` int64: those of p, then those of p'.
        agrees: ``[K]`` bool, whether the greedy choices match.

    Raises:
        ValueError: for an agreement outside [0, 1], or too few text tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        agreement: float,
        num_text_tokens: int,
        seed: int = 0,
    ):
        slots = 2 * len(PROBABILITIES)
        if not 0 <= agreement <= 1:
            raise ValueError(f"agreement must be in [0, 1], got {agreement}")
        if not 1 <= num_classes <= num_text_tokens // slots:
            raise ValueError(f"num_classes must be 1 to {num_text_tokens // slots}, got {num_classes}")
        generator = torch.Generator().manual_seed(seed)

        def shuffled(count: int) -> torch.Tensor:
            return torch.randperm(count, generator=generator)

        self.vocab_size, self.num_classes = vocab_size, num_classes
        # The token of each slot and class is the successor of one class alone, so no two laws share a token.
        tokens = FIRST_TEXT_TOKEN + shuffled(num_text_tokens)[: slots * num_classes].view(slots, num_classes)
        self.class_of = torch.randint(num_classes, (vocab_size,), generator=generator)
        self.class_of[tokens] = torch.arange(num_classes)
        order = shuffled(num_classes)
        ring = torch.empty_like(order).scatter_(0, order, order.roll(-1))
        following = torch.stack([ring, *(shuffled(num_classes) for _ in range(slots - 1))])
        self.successors = tokens.gather(1, following).T.contiguous()

        num_agreeing = round(agreement * num_classes)
        self.agreement = num_agreeing / num_classes
        self.agrees = torch.zeros(num_classes, dtype=torch.bool)
        self.agrees[shuffled(num_classes)[:num_agreeing]] = True

    def probabilities(self, draft: bool = False) -> torch.Tensor:
        """``[K, 8]`` float64: the masses of ``successors`` under p, or under q."""
        mass = torch.tensor(PROBABILITIES, dtype=torch.float64)
        weight = torch.ones(self.num_classes, dtype=torch.float64)
        if draft:
            agreeing, other = 1 - (1 - self.agreement) / 3, self.agreement / 3
            weight = torch.where(self.agrees, agreeing, other).double()
        return torch.cat([weight[:, None] * mass, (1 - weight[:, None]) * mass], dim=1)

    def after(self, token: int, draft: bool = False) -> dict[int, float]:
        """The tokens that may follow a token, and their probabilities."""
        row = self.class_of[token]
        pairs = zip(self.successors[row].tolist(), self.probabilities(draft)[row].tolist(), strict=True)
        return {successor: probability for successor, probability in pairs if probability > 0}

    def rows(self, tokens: torch.Tensor, draft: bool = False) -> torch.Tensor:
        """The laws after tokens ``[n]``, ``[n, V]`` float64."""
        classes = self.class_of[tokens.cpu()]
        law = torch.zeros(len(classes), self.vocab_size, dtype=torch.float64)
        return law.scatter_(1, self.successors[classes], self.probabilities(draft)[classes])
