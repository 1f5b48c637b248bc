"""The losses of a draft's law q against the target's law p, and the objective that matters: expected acceptance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

#: The losses by name. Each takes the draft's logits ``[M, V]``, the target's ``[M, V']`` (None for
#: cross-entropy alone) and the answers' tokens ``[M]``, and returns ``[M]``.
Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def laws(draft_logits: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p over the ids that both have, in float32.

    The draft is never asked for ids that the target lacks, so q is normalised over the common ones. The target
    keeps the mass of ids that the draft lacks: nothing will be accepted for it.
    """
    common = min(draft_logits.shape[-1], target_logits.shape[-1])
    log_q = draft_logits[..., :common].float().log_softmax(-1)
    log_p = target_logits.float().log_softmax(-1)[..., :common]
    return log_q, log_p


def expected_acceptance(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """``[M]``: Σ_v min(p(v), q(v)), the chance that a token drawn from q is accepted (2211.17192, theorem 3.5)."""
    log_q, log_p = laws(draft_logits, target_logits)
    return torch.minimum(log_q, log_p).exp().sum(-1)


def cross_entropy(draft_logits: Tensor, target_logits: Tensor | None, answers: Tensor) -> Tensor:
    """−log q of the answer's token; 0 for a token that the draft lacks."""
    known = answers.where(answers < draft_logits.shape[-1], -100)
    return F.cross_entropy(draft_logits.float(), known, reduction="none", ignore_index=-100)


def forward_kl(draft_logits: Tensor, target_logits: Tensor | None, answers: Tensor) -> Tensor:
    """KL(p ‖ q)."""
    log_q, log_p = laws(draft_logits, target_logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(draft_logits: Tensor, target_logits: Tensor | None, answers: Tensor) -> Tensor:
    """KL(q ‖ p)."""
    log_q, log_p = laws(draft_logits, target_logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def total_variation(draft_logits: Tensor, target_logits: Tensor | None, answers: Tensor) -> Tensor:
    """1 − Σ_v min(p(v), q(v)), the chance of a rejection."""
    return 1 - expected_acceptance(draft_logits, target_logits)


def tvd_plus_plus(draft_logits: Tensor, target_logits: Tensor | None, answers: Tensor) -> Tensor:
    """Total variation in value, with the gradient of TVD++ (2403.00858).

    The gradient of total variation is a policy gradient, E_{x∼q}[−r(x) ∇log q(x)] with the reward r(x) = 1 where
    p(x) > q(x), else 0. TVD++ takes the advantage (r − μ) / σ in the reward's place; here μ and σ are mean and
    deviation of the reward over x ∼ q at all positions of a process's batch. The expectation is taken exactly, over
    the whole vocabulary, so nothing is sampled; μ then drops out of the gradient, and σ makes the steps of total
    variation longer where nearly all rewards are alike.
    """
    log_q, log_p = laws(draft_logits, target_logits)
    q = log_q.exp()
    with torch.no_grad():
        reward = (log_p > log_q).float()
        mean = (q * reward).sum(-1).mean()
        # A reward of 0 and 1 has this variance; the floor serves a draft that equals the target.
        deviation = (mean * (1 - mean)).sqrt().clamp(min=1e-4)
        advantage = (reward - mean) / deviation
    surrogate = -(q * advantage).sum(-1)
    value = 1 - torch.minimum(log_q, log_p).exp().sum(-1)
    return value.detach() + surrogate - surrogate.detach()


LOSSES: dict[str, Loss] = {
    "cross-entropy": cross_entropy,
    "forward-kl": forward_kl,
    "reverse-kl": reverse_kl,
    "total-variation": total_variation,
    "tvd++": tvd_plus_plus,
}


def find_loss(name: str) -> Loss:
    """The loss of this name.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; expected one of {', '.join(LOSSES)}")
    return LOSSES[name]
