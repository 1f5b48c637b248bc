import pytest
import torch

from fastspec import philox
from fastspec.philox import Stream, accept_uniforms, exponentials, philox4x32, race

# Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_draws_depend_on_every_part_of_the_key_and_on_nothing_else():
    seed, position = torch.tensor([5, -3, 2**62]), torch.tensor([[7, 7], [9, 9], [7, 7]])
    node = torch.tensor([0, 1])
    full = exponentials(seed, position, Stream.DRAFT, node, 33)
    assert full.flatten().unique().numel() == full.numel()
    alone = exponentials(seed[2:], position[2:], Stream.DRAFT, node, 33)
    assert torch.equal(full[2:], alone)
    assert torch.equal(exponentials(seed, position, Stream.DRAFT, node, 8), full[..., :8])
    for changed in (
        exponentials(seed, position, Stream.EMIT, node, 33),
        exponentials(seed, position + 1, Stream.DRAFT, node, 33),
        exponentials(seed, position, Stream.DRAFT, node + 2, 33),
        exponentials(seed + 2**32, position, Stream.DRAFT, node, 33),
    ):
        assert not (changed == full).any()


def test_accept_uniforms_exclude_zero_and_include_one(monkeypatch):
    arguments = torch.tensor([1]), torch.tensor([1]), torch.tensor([0])
    zeros, ones = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 0xFFFFFFFF)
    monkeypatch.setattr(philox, "_blocks", lambda *_: ((zeros,) * 4,) * 2)
    assert accept_uniforms(*arguments).item() == 2.0**-53
    monkeypatch.setattr(philox, "_blocks", lambda *_: ((ones,) * 4,) * 2)
    assert accept_uniforms(*arguments).item() == 1.0


@pytest.mark.parametrize(("bits", "winner"), [(0, 1), (1 << 11, 1), (1 << 40, 0)])
def test_improbable_tokens_can_be_drawn(monkeypatch, bits, winner):
    """A token of weight 1e-12 wins when its noise says so; 24-bit noise could never let it."""
    high, low = torch.tensor([[[bits >> 32]]]), torch.tensor([[[bits & 0xFFFFFFFF]]])
    half = torch.tensor([[[1 << 31]]])
    monkeypatch.setattr(philox, "_blocks", lambda *_: ((half, high, half, half), (half, low, half, half)))
    noise = exponentials(torch.tensor([1]), torch.tensor([[1]]), Stream.DRAFT, torch.tensor([0]), 2)
    weights = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    assert race(weights, noise[0, 0]).argmax() == winner
    coarse = -torch.log1p(-((noise[0, 0].float() * 2**24).round() + 0.5) / 2**24).double()
    assert race(weights, coarse).argmax() == 0


def test_exponentials_are_exponential():
    seeds = torch.arange(2000)
    sample = exponentials(
        seeds, torch.zeros(2000, 1, dtype=torch.int64), Stream.DRAFT, torch.tensor([0]), 100
    )
    assert sample.min() > 0
    ordered = sample.flatten().sort().values
    empirical = (torch.arange(ordered.numel(), dtype=torch.float64) + 0.5) / ordered.numel()
    deviation = (1 - torch.exp(-ordered) - empirical).abs().max()  # Kolmogorov-Smirnov
    assert deviation < 2.0 / ordered.numel() ** 0.5


def test_race_never_draws_a_token_of_weight_zero():
    weights = torch.tensor([0.0, 1e-300, 0.0], dtype=torch.float64)
    noise = torch.tensor([1e-16, float("inf"), 1e-16], dtype=torch.float64)
    assert race(weights, noise).argmax() == 1
