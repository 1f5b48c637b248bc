"""Seeded configurations of verify and propose: any tree, vocabulary, batch, element type, parameters and mishap."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from fastspec import DraftTree
from fastspec.ops import propose
from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.verification import Rule

VOCABULARIES = (1, 2, 31, 32, 33, 511, 512, 513, 2047, 2048, 2049, 4095, 4096, 4097)
LARGE_VOCABULARIES = (32000, 32064, 128256, 151936, 262144)
CHAIN_RULES = (Rule.TOKEN_LEVEL, Rule.BLOCK, Rule.RECURSIVE_REJECTION, Rule.TRAVERSAL)
TREE_RULES = (Rule.RECURSIVE_REJECTION, Rule.TARGET_ONLY, Rule.DRAFTER_INVARIANT)


@dataclass
class Case:
    """Inputs of one verification."""

    tree: DraftTree
    rule: Rule
    target_logits: torch.Tensor
    draft_logits: torch.Tensor
    tokens: torch.Tensor
    sampling: SamplingTensors
    positions: torch.Tensor
    description: str


def random_tree(generator: torch.Generator, max_nodes: int) -> DraftTree:
    """A chain, a k-ary tree or an irregular one."""
    kind = pick(generator, ("chain", "chain", "kary", "random"))
    if kind == "chain":
        return DraftTree.chain(integer(generator, 1, min(9, max_nodes)))
    if kind == "kary":
        options = [(2, 2), (3,), (4, 1, 1), (2, 2, 2), (3, 2, 1), (8,), (4, 3)]
        fitting = [one for one in options if DraftTree.kary(one).num_nodes <= max_nodes] or [(2,)]
        return DraftTree.kary(pick(generator, fitting))
    parents = [-1]
    for _ in range(integer(generator, 1, max_nodes)):
        parents.append(integer(generator, max(parents[-1], 0), len(parents)))
    return DraftTree(tuple(parents))


def pick(generator, options):
    return options[integer(generator, 0, len(options))]


def integer(generator, low, high):
    return int(torch.randint(low, max(high, low + 1), (), generator=generator))


def random_params(generator, vocab_size: int, position: int) -> SamplingParams:
    kind = pick(generator, ("plain", "plain", "greedy", "top_k", "top_p", "min_p", "all", "flat"))
    params = {
        "plain": {"temperature": 1.0},
        "greedy": {"temperature": 0.0},
        "top_k": {"top_k": integer(generator, 1, vocab_size + 3)},
        "top_p": {"top_p": pick(generator, (0.0, 0.1, 0.5, 0.9, 0.99))},
        "min_p": {"min_p": pick(generator, (0.01, 0.2, 1.0))},
        "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        "flat": {"temperature": 50.0, "top_p": 0.95},
    }[kind]
    if integer(generator, 0, 4) == 0:
        params = {**params, "repetition_penalty": pick(generator, (0.7, 1.3))}
    if integer(generator, 0, 6) == 0:
        params = {**params, "min_tokens": position + 2}
    return SamplingParams(**params)


def random_logits(generator, shape, kind: str) -> torch.Tensor:
    logits = torch.randn(shape, generator=generator) * 3
    if kind == "peaked":
        logits = logits * 4
    elif kind == "ties":
        logits = (logits / 3).round()
    elif kind == "flat":
        logits = logits * 0.01
    elif kind == "masked":
        logits = logits.masked_fill(torch.rand(shape, generator=generator) < 0.5, float("-inf"))
    elif kind == "onehot":
        logits = torch.where(logits == logits.amax(-1, keepdim=True), 40.0, -40.0)
    elif kind == "poisoned":
        row = torch.rand(shape[:-1], generator=generator)
        column = torch.randint(shape[-1], shape[:-1], generator=generator)
        for low, high, value in ((0.0, 0.2, float("nan")), (0.2, 0.3, float("inf"))):
            bad = logits.scatter(-1, column[..., None], value)
            logits = torch.where(((row >= low) & (row < high))[..., None], bad, logits)
        logits = torch.where(((row > 0.5) & (row < 0.6))[..., None], float("-inf"), logits)
    return logits


def random_case(
    seed: int,
    device: str = "cpu",
    max_nodes: int = 12,
    vocabularies=VOCABULARIES,
    max_batch: int = 3,
    tree: DraftTree | None = None,
    rule: Rule | None = None,
    dtype: torch.dtype | None = None,
    params: tuple[SamplingParams, ...] = (),
):
    """Case number ``seed``; the same on every machine.

    What is given is not left to chance; with ``params``, there are as many sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn_tree = random_tree(generator, max_nodes)
    tree = tree or drawn_tree
    drawn_rule = pick(generator, CHAIN_RULES + TREE_RULES if tree.is_chain else TREE_RULES)
    rule = rule or drawn_rule
    vocab_size = pick(generator, vocabularies)
    drawn_batch = integer(generator, 1, max_batch + 1)
    batch = len(params) or drawn_batch
    kinds = ("plain", "plain", "peaked", "ties", "flat", "masked", "onehot", "poisoned")
    kind = pick(generator, kinds)
    drawn_dtype = pick(generator, (torch.float32, torch.float32, torch.bfloat16, torch.float16))
    dtype = dtype or drawn_dtype
    target = random_logits(generator, (batch, tree.num_nodes, vocab_size), kind).to(dtype)

    sampling = SamplingTensors(batch, vocab_size, "cpu")
    positions = torch.randint(3, 2000, (batch,), generator=generator)
    for row in range(batch):
        eos = [integer(generator, 0, vocab_size) for _ in range(integer(generator, 0, 3))]
        drawn_params = random_params(generator, vocab_size, int(positions[row]))
        seed_of_row = int(torch.randint(2**62, (), generator=generator)) - 2**61
        sampling.set(row, params[row] if params else drawn_params, seed_of_row, eos)
        sampling.seen[row] = torch.rand(vocab_size, generator=generator) < 0.1

    relation = pick(generator, ("close", "close", "same", "unrelated", "poisoned"))
    inner = target[:, list(tree.inner)].float()
    if relation == "close":
        draft = inner + torch.randn(inner.shape, generator=generator)
    elif relation == "same":
        draft = inner.clone()
    else:
        draft = random_logits(
            generator, tuple(inner.shape), "poisoned" if relation == "poisoned" else "plain"
        )
    tokens = torch.randint(vocab_size, (batch, tree.num_nodes), generator=generator)
    draft_logits = torch.zeros(batch, len(tree.inner), vocab_size)
    for level, nodes in enumerate(tree.levels):
        rows = [tree.inner_index[node] for node in nodes]
        propose(
            draft[:, rows].contiguous(),
            level,
            tree,
            tokens,
            draft_logits,
            sampling,
            positions,
            rule,
            "reference",
        )
    mishap = pick(generator, ("none", "none", "none", "absent", "random tokens", "broken draft row"))
    if mishap == "absent":
        tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = -1
        tokens[:, 0] = 0
        if kind == "onehot":
            # A later sibling alone would be a token of probability 1e-13, whose residual only doubles can tell.
            for children in tree.children:
                for elder, younger in itertools.pairwise(children):
                    tokens[tokens[:, elder] < 0, younger] = -1
    elif (
        mishap == "random tokens" and relation != "same" and (kind, relation) != ("onehot", "close")
    ):  # p = q, or both sure of one token, leave rounding alone, which no test can compare
        tokens = torch.randint(vocab_size, tokens.shape, generator=generator)
    elif mishap == "broken draft row":
        draft_logits[:, integer(generator, 0, len(tree.inner)), integer(generator, 0, vocab_size)] = float(
            "nan"
        )

    return Case(
        tree,
        rule,
        target.to(device),
        draft_logits.to(device),
        tokens.to(device),
        sampling.to(device),
        positions.to(device),
        f"seed {seed}: {rule.value}, {tree.num_nodes} nodes, V={vocab_size}, B={batch}, {dtype}, {kind}, "
        f"{relation}, {mishap}",
    )


def raw_draft_logits(case: Case, seed: int, level: int, padded: bool) -> torch.Tensor:
    """Raw logits for a level of the case's tree, as a draft with another vocabulary size would give them."""
    generator = torch.Generator().manual_seed(seed * 7 + level)
    batch, _, vocab_size = case.target_logits.shape
    size = max(1, vocab_size + (integer(generator, -2, 4) if padded else 0))
    kind = pick(generator, ("plain", "peaked", "ties", "masked", "onehot", "poisoned", "flat"))
    dtype = pick(generator, (torch.float32, torch.bfloat16, torch.float16))
    logits = random_logits(generator, (batch, len(case.tree.levels[level]), size), kind)
    return logits.to(dtype).to(case.target_logits.device)
