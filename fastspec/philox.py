"""Counter-based random numbers: Philox4x32-10, the law that every backend reproduces bit for bit.

A draw is a pure function of (seed, position, stream, node, lane); there is no generator state, so results
do not depend on the batch, the launch shape or the order of evaluation.

============  =====================================================================================
key           the sequence's 64-bit seed
counter 0     lane // 4; the lane is a vocabulary id for exponential draws and 0 for an accept test
counter 1     stream * 65536 + node
counter 2     position: for every stream but ``COUPLED`` the position of the first token of the cycle
counter 3     0 for the high words, 1 for the low ones
============  =====================================================================================

A draw has 53 bits: word ``lane % 4`` of the high block above 21 bits of the same word of the low block. A kernel
needs the low block only where the high word is so small that its digits would show.

Why the *cycle's* position and not the token's: block and traversal verification look at draws of later
depths before they decide where to stop. Were those draws reused for the same position in the next cycle, they
would no longer be independent of the decision. A cycle's first position occurs once, so every draw is fresh.
Only the drafter-invariant rule wants the opposite, and keys ``COUPLED`` by the token's own position.

Source: Salmon et al., *Parallel Random Numbers: As Easy as 1, 2, 3* (SC 2011).
"""

from __future__ import annotations

from enum import IntEnum

import torch

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """Disjoint sources of randomness within a cycle."""

    DRAFT = 0  # the children of a node
    ACCEPT = 1  # the test of a node
    EMIT = 2  # the residual or bonus token after the path; the node it stops at tells the two apart
    TARGET = 3  # one sample of a node's row, for target-only verification
    COUPLED = 4  # noise shared by draft and target, keyed by the token's own position


def philox4x32(counter: tuple, key: tuple) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; all arguments broadcast.

    Args:
        counter: four words.
        key: two words.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 products wrap modulo 2**64, which leaves both 32-bit halves right.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> 32 & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32 & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _blocks(
    seed, position, stream: int, node, quad
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """High and low words of the four lanes of a quad."""
    key = seed & _MASK, seed >> 32 & _MASK
    counter = quad, node + (int(stream) << 16), position & _MASK
    high, low = torch.zeros_like(quad), torch.ones_like(quad)
    return philox4x32((*counter, high), key), philox4x32((*counter, low), key)


def _bits53(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    return high << 21 | low >> 11


def accept_uniforms(seed: torch.Tensor, position: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1] with 53 bits for the accept tests, to be compared as ``u <= h``.

    Zero is excluded and one is included, so that h = 0 never accepts and h = 1 always does.

    Args:
        seed: ``[B]`` int64.
        position: ``[B]`` int64, the position of the cycle's first token.
        nodes: ``[N]`` int64 node indices.

    Returns:
        ``[B, N]`` float64.
    """
    quad = torch.zeros_like(nodes)[None]
    high, low = _blocks(seed[:, None], position[:, None], Stream.ACCEPT, nodes[None], quad)
    return (_bits53(high[0], low[0]) + 1).double() * 2.0**-53


def exponentials(
    seed: torch.Tensor, position: torch.Tensor, stream: Stream, node: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """Unit exponentials, one for each vocabulary id: the token with the largest ``w / e`` is a draw from w.

    The race needs its smallest exponentials in full relative precision, or improbable tokens are never
    drawn: e = -log1p(-t) with t = (k + 1/2) / 2**53 resolves e down to 2**-54.

    Args:
        seed: ``[B]`` int64.
        position: ``[B, R]`` int64.
        stream: which of the disjoint streams.
        node: ``[B, R]`` or ``[R]`` int64.
        vocab_size: V.

    Returns:
        ``[B, R, V]`` float64, positive.
    """
    quad = torch.arange((vocab_size + 3) // 4, device=seed.device)
    high, low = _blocks(seed[:, None, None], position[..., None], stream, node[..., None], quad)
    bits = torch.stack([_bits53(*words) for words in zip(high, low, strict=True)], dim=-1)
    t = (bits.flatten(-2)[..., :vocab_size].double() + 0.5) * 2.0**-53
    return -torch.log1p(-t)


def race(weights: torch.Tensor, exponentials: torch.Tensor) -> torch.Tensor:
    """Scores whose argmax is one draw from ``weights`` and whose top k are k draws without replacement.

    Args:
        weights: ``[..., V]`` non-negative, not necessarily normalised.
        exponentials: ``[..., V]``.

    Returns:
        ``[..., V]`` scores; -1 where the weight is zero, so that such a token can never win.
    """
    return torch.where(weights > 0, weights / exponentials, -1.0)
