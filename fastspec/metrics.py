"""What speculation gained: block efficiency, acceptance by position, memory-bound speed-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastspec.state import FinishReason

#: Numbers that the bootstrap holds in memory together.
MAX_RESAMPLED = 2**20


def memory_bound_speedup(block_efficiency: float, cost_ratio: float, draft_passes: int) -> float:
    """MBSU = τ / (c γ + 1), the speed-up if passes cost what their weights take to read.

    Args:
        block_efficiency: τ, tokens per target pass.
        cost_ratio: c, bytes read by a draft pass over bytes read by a target pass.
        draft_passes: γ, draft passes per cycle (the depth of a tree).

    Source: Gagrani et al., 2404.08856, section 4.
    """
    return block_efficiency / (cost_ratio * draft_passes + 1)


def bootstrap_interval(
    samples: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap of a statistic of sums, such as the ratio of tokens to passes over all prompts.

    Args:
        samples: ``[n, k]``, k counts or times of each of n prompts; prompts are resampled, rows kept whole.
        statistic: from sums over prompts ``[..., k]`` to the statistic ``[...]``.
        level: how much of the resampled statistic lies inside.
        resamples: how often n prompts are drawn with replacement.
        seed: makes the interval reproducible.

    Returns:
        The interval's ends; None where fewer than two prompts say nothing of how prompts differ, or the
        statistic is never finite.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    samples = np.asarray(samples, dtype=float)
    count = len(samples)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    at_once = max(1, MAX_RESAMPLED // samples.size)
    sums = np.concatenate(
        [
            samples[generator.integers(count, size=(min(at_once, resamples - first), count))].sum(1)
            for first in range(0, resamples, at_once)
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        values = statistic(sums)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class SpeculationRecord:
    """Statistics of one generation, one entry per sequence.

    Attributes:
        num_nodes: N, rows of a target pass.
        draft_passes: draft passes per cycle.
        cycles: target passes over a tree.
        committed: tokens committed by cycles; the prefill's first token is not among them.
        accepted: for each sequence, how many cycles committed 0, 1, ... drafted tokens.
        finish_reasons: why each sequence ended.
        cost_ratio: c, bytes of a draft pass over bytes of a target pass.
        drafted: for each output token of each sequence, whether it was drafted.
    """

    num_nodes: int
    draft_passes: int
    cycles: tuple[int, ...]
    committed: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    cost_ratio: float
    drafted: tuple[tuple[bool, ...], ...] = field(default=(), repr=False)

    @property
    def target_passes(self) -> int:
        """Target passes over trees, all sequences together."""
        return sum(self.cycles)

    @property
    def block_efficiency(self) -> float:
        """τ: tokens committed per target pass; 1 for plain decoding, NaN before the first cycle."""
        return sum(self.committed) / self.target_passes if self.target_passes else float("nan")

    @property
    def mean_accepted(self) -> float:
        """Drafted tokens committed per cycle."""
        total = sum(count * cycles for row in self.accepted for count, cycles in enumerate(row))
        return total / self.target_passes if self.target_passes else float("nan")

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """For each depth, the share of cycles that committed a drafted token there."""
        if not self.target_passes:
            return ()
        histogram = [sum(row[count] for row in self.accepted) for count in range(len(self.accepted[0]))]
        return tuple(sum(histogram[depth:]) / self.target_passes for depth in range(1, len(histogram)))

    @property
    def mbsu(self) -> float:
        """Memory-bound speed-up at this block efficiency."""
        return memory_bound_speedup(self.block_efficiency, self.cost_ratio, self.draft_passes)
