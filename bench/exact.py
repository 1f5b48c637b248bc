"""Does speculation say what plain decoding says, token for token and bit for bit of the logits, at true shapes?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from bench.report import finding_row
from bench.setup import Setup
from fastspec import DraftTree
from fastspec.decoder import Request, SpeculativeDecoder
from fastspec.sampling import SamplingParams
from fastspec.verification import Rule

TREES = {"chain5": DraftTree.chain(5), "tree16": DraftTree.kary((3, 2, 1))}
AGREEMENT = 0.75
BATCH_SIZE = 8
#: Shortest text after the image, and how much longer others are at most.
TEXT, MORE_TEXT = 8, 48
#: Prompts in batches, prompts one by one, prompts in batches that are sampled; and tokens of each answer.
SIZES = {"llava7b": (104, 16, 40, 128)}
QUICK_SIZES = {"llava7b": (104, 4, 16, 128)}
SMALL_SIZES = (8, 2, 8, 24)
KINDS = {
    "greedy": (None, SamplingParams(temperature=0.0)),
    # Its noise belongs to positions, so samples are those of plain decoding too.
    "invariant": (Rule.DRAFTER_INVARIANT, SamplingParams(temperature=1.0)),
}


class Answer(NamedTuple):
    """What a decoder says to one prompt.

    Attributes:
        tokens: the answer.
        logits: for each token a number that its raw logits make: other bits, other number.
    """

    tokens: list[int]
    logits: list[int]


def measure(setup: Setup) -> list[dict]:
    """Rows ``exact/<pair>/<kind>/<tree>/batch<B>``: how much of the answers is equal, and where they part."""
    sizes = QUICK_SIZES if setup.quick else SIZES
    prompts, few, invariant, tokens = sizes.get(setup.target, SMALL_SIZES)
    draft = setup.draft_model(AGREEMENT)
    rows = []
    for kind, batch_size, count in (
        ("greedy", BATCH_SIZE, prompts),
        ("greedy", 1, few),
        ("invariant", BATCH_SIZE, invariant),
    ):
        rule, params = KINDS[kind]
        requests = make_requests(setup, count, tokens, params)
        shape = {
            "batch_size": batch_size,
            "rule": rule,
            "capacity": max(one.prompt.num_tokens for one in requests) + tokens,
        }
        plain = SpeculativeDecoder(setup.target_model, None, **shape)
        expected = answers(plain, requests)
        for name, tree in TREES.items():
            decoder = SpeculativeDecoder(setup.target_model, draft, tree=tree, **shape)
            given = answers(decoder, requests)

            def margin(prompt: int, position: int, token: int, plain=plain, requests=requests) -> float:
                return margin_over(plain, requests[prompt], position, token)

            figures = compare(expected, given, margin)
            rows.append(finding_row(f"exact/{setup.pair}/{kind}/{name}/batch{batch_size}", **figures))
            del decoder
    return rows


def make_requests(setup: Setup, count: int, tokens: int, params: SamplingParams) -> list[Request]:
    """Requests of different lengths and seeds, each about an image of its own."""
    first_text = setup.target_model.config.image_seq_length + 1
    lengths = [first_text + TEXT + 7 * index % MORE_TEXT for index in range(count)]
    return [
        Request(setup.prompt(length, seed), tokens, params, seed=seed) for seed, length in enumerate(lengths)
    ]


def answers(decoder: SpeculativeDecoder, requests: Sequence[Request]) -> list[Answer]:
    """What a decoder says, in batches as large as it takes."""
    said = [Answer([], []) for _ in requests]
    for first in range(0, len(requests), decoder.batch_size):
        for commitment in decoder.stream(requests[first : first + decoder.batch_size], ahead=1):
            # The token after a node was chosen from that node's logits.
            numbers = fingerprint(decoder.last_logits).gather(1, decoder.last_path).tolist()
            for answer, tokens, row in zip(said[first:], commitment.tokens, numbers, strict=False):
                answer.tokens.extend(tokens)
                answer.logits.extend(row[: len(tokens)])
    return said


def fingerprint(logits: torch.Tensor) -> torch.Tensor:
    """A number ``[B, R]`` int64 for the bits of each row of logits ``[B, R, V]``."""
    bits = logits.float().view(torch.int32).long()
    return (bits * _weights(logits.shape[-1], logits.device)).sum(-1)


@lru_cache(maxsize=4)
def _weights(size: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2**62, (size,), generator=generator) * 2 + 1).to(device)


def compare(
    expected: Sequence[Answer], given: Sequence[Answer], margin: Callable[[int, int, int], float]
) -> dict:
    """Figures of a row: how many prompts, tokens and rows of logits are equal, until an answer parts from its own.

    Args:
        expected, given: answers of plain decoding, and those to compare.
        margin: from prompt, position and the other token: how much higher plain decoding's own logit was.
    """
    figures = {
        "prompts": len(expected),
        "equal_prompts": 0,
        "tokens": 0,
        "equal_tokens": 0,
        "equal_logits": 0,
    }
    divergences = []
    for prompt, (ours, theirs) in enumerate(zip(expected, given, strict=True)):
        pairs = list(zip(ours.tokens, theirs.tokens, strict=False))
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
        figures["tokens"] += len(ours.tokens)
        figures["equal_tokens"] += same
        figures["equal_prompts"] += ours.tokens == theirs.tokens
        figures["equal_logits"] += sum(
            one == other for one, other in zip(ours.logits[:same], theirs.logits[:same], strict=True)
        )
        if same < len(pairs):
            other = theirs.tokens[same]
            divergences.append(
                {"prompt": prompt, "position": same, "margin": round(margin(prompt, same, other), 4)}
            )
    return {**figures, "divergences": divergences}


def margin_over(plain: SpeculativeDecoder, request: Request, position: int, token: int) -> float:
    """How much higher than another token's the logit was of the token that plain decoding said at a position."""
    said = []
    for commitment in plain.stream([request], ahead=1):
        said += commitment.tokens[0]
        if len(said) > position:
            break
    logits = plain.last_logits[0, -1].float()
    return float(logits[said[position]] - logits[token])
