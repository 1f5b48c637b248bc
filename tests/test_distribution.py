"""The production cycle samples the target's law: chi-squared over the joint law of three tokens."""

import pytest
import torch
from models import texts
from table_model import sample_tokens, table_decoder

from fastspec import DraftTree, philox
from fastspec.decoder import Request
from fastspec.draft import TextDraft
from fastspec.model.vision import Prompt
from fastspec.sampling import SamplingParams, SamplingTensors
from fastspec.verification import Rule

POSITIONS, TOKENS = 8, 3
BATCH_SIZE = 8
CHAIN, TREE = DraftTree.chain(2), DraftTree.kary((3, 2))


def tables(vocab_size, kind, seed=0):
    """Target and an adversarial draft, ``[positions, V, V]`` logits, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(POSITIONS, vocab_size, vocab_size, generator=generator) * 1.2
    draft = {
        "unrelated": lambda: torch.randn(target.shape, generator=generator) * 1.5,
        "negated": lambda: -target,
        "equal": lambda: target.clone(),
        "close": lambda: target + 0.3 * torch.randn(target.shape, generator=generator),
        "onehot": lambda: torch.where(target == target.amax(-1, keepdim=True), 50.0, 0.0),
        "missing": lambda: torch.where(
            torch.rand(target.shape, generator=generator) < 0.4, float("-inf"), target
        ),
    }[kind]()
    return target, draft


def joint_law(target, params):
    """The target's law of the first three tokens after token 0 at position 0, by transformers' definitions."""
    target = target.cpu()
    sampling = SamplingTensors(1, target.shape[-1], "cpu")
    sampling.set(0, params, 0)
    law = sampling.warp(target.double().flatten(0, 1)[None]).softmax(-1)[0].view_as(target)
    first = law[0, 0]
    second = first[:, None] * law[1]
    return second[..., None] * law[2][None]


def chi_squared(counts, law):
    """(statistic, degrees of freedom); cells of tiny expectation are pooled, impossible ones must be empty."""
    total = counts.sum()
    assert counts[law == 0].sum() == 0, "a token of probability zero was emitted"
    expected, observed = law[law > 0] * total, counts[law > 0].double()
    small = expected < 10
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed = torch.cat([observed[~small], observed[small].sum()[None]])
    keep = expected > 0
    expected, observed = expected[keep], observed[keep]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def sampled_law(target, draft, tree, rule, params, trials):
    vocab_size = target.shape[-1]
    batch = 4_000 if target.device.type == "cpu" else 20_000
    decoder = table_decoder(target, draft, tree, rule, min(batch, trials))
    counts = torch.zeros(vocab_size**TOKENS, dtype=torch.int64, device=target.device)
    weights = vocab_size ** torch.arange(TOKENS - 1, -1, -1, device=target.device)
    for first_seed in range(0, trials, decoder.batch_size):
        tokens = sample_tokens(decoder, TOKENS, params, first_seed)
        counts += torch.bincount((tokens * weights).sum(1), minlength=len(counts))
    return counts.cpu().view([vocab_size] * TOKENS)


def check(target, draft, tree, rule, params, trials):
    statistic, freedom = chi_squared(
        sampled_law(target, draft, tree, rule, params, trials), joint_law(target, params)
    )
    assert statistic < freedom + 10 * (2 * freedom) ** 0.5, (statistic, freedom)


CASES = [
    (rule, tree)
    for rule in Rule
    for tree in (CHAIN, TREE)
    if tree.is_chain or rule not in (Rule.TOKEN_LEVEL, Rule.BLOCK)
]


@pytest.mark.parametrize("kind", ["unrelated", "negated", "equal", "onehot", "missing"])
@pytest.mark.parametrize(("rule", "tree"), CASES, ids=lambda value: getattr(value, "value", None))
def test_every_rule_samples_the_target(rule, tree, kind, exhaustive):
    target, draft = tables(8, kind)
    check(target, draft, tree, rule, SamplingParams(), 1_000_000 if exhaustive else 24_000)


@pytest.mark.parametrize(
    ("rule", "tree"), [(Rule.BLOCK, CHAIN), (Rule.RECURSIVE_REJECTION, DraftTree.kary((2, 1)))]
)
def test_a_million_trials(rule, tree):
    target, draft = tables(8, "close")
    check(target, draft, tree, rule, SamplingParams(), 1_000_000)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2, temperature=1.5),
        SamplingParams(temperature=0.8, top_k=6, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize(("rule", "tree"), [(Rule.BLOCK, CHAIN), (Rule.RECURSIVE_REJECTION, TREE)])
def test_warped_laws(rule, tree, params, exhaustive):
    target, draft = tables(8, "unrelated", seed=4)
    check(target, draft, tree, rule, params, 1_000_000 if exhaustive else 24_000)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [16, 32])
def test_wider_vocabularies(vocab_size):
    target, draft = tables(vocab_size, "unrelated")
    check(target, draft, CHAIN, Rule.BLOCK, SamplingParams(), 1_000_000)


# Through the stream: prefill, captured cycles launched ahead or in a loop, tokens as the host reads them.


def periodic(table, length):
    """A law ``[length, V, V]`` that repeats that of the first three positions."""
    return table[:TOKENS].repeat(-(-length // TOKENS), 1, 1)[:length].contiguous()


def streamed_law(target, draft, tree, rule, params, trials, length, launch="ahead", draft_params=None):
    """Counts of three successive tokens, from answers that begin anew every three tokens.

    The law of every third token does not look at the token before it, so each answer of ``length - 1`` tokens is a
    sequence of independent trials of the law of the first three, wherever in them the cycles begin and end. A million
    trials so need some hundred prefills, and nothing has to be put back between replays.
    """
    vocab_size = target.shape[-1]
    forgetful = target.clone()
    forgetful[0] = target[0, 0]
    decoder = table_decoder(
        periodic(forgetful, length), periodic(draft, length), tree, rule, BATCH_SIZE, launch
    )
    prompt = Prompt(torch.zeros(1, dtype=torch.int64, device=target.device))
    new = (length - 1) // TOKENS * TOKENS
    weights = vocab_size ** torch.arange(TOKENS - 1, -1, -1)
    counts = torch.zeros(vocab_size**TOKENS, dtype=torch.int64)
    seed = 0
    while counts.sum() < trials:
        requests = [Request(prompt, new, params, draft_params, seed + row) for row in range(BATCH_SIZE)]
        tokens = torch.tensor(texts(decoder, requests)).view(-1, TOKENS)
        counts += torch.bincount((tokens * weights).sum(1), minlength=len(counts))
        seed += BATCH_SIZE
    if target.is_cuda:
        assert decoder._graph is not None
        assert (decoder._loop is not None) == (launch == "loop")
    return counts.view([vocab_size] * TOKENS)


def check_stream(target, draft, tree, rule, params, trials, length, launch="ahead", draft_params=None):
    counts = streamed_law(target, draft, tree, rule, params, trials, length, launch, draft_params)
    statistic, freedom = chi_squared(counts, joint_law(target, params))
    assert statistic < freedom + 10 * (2 * freedom) ** 0.5, (statistic, freedom)


@pytest.mark.parametrize(("rule", "tree"), [(Rule.BLOCK, CHAIN), (Rule.RECURSIVE_REJECTION, TREE)])
def test_the_stream_samples_the_target(rule, tree):
    target, draft = tables(4, "unrelated")
    check_stream(target, draft, tree, rule, SamplingParams(), 2_400, length=301)


@pytest.mark.parametrize(
    ("rule", "tree"), [(Rule.BLOCK, CHAIN), (Rule.RECURSIVE_REJECTION, TREE), (Rule.TRAVERSAL, TREE)]
)
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_a_draft_that_samples_another_way_leaves_the_law_alone(rule, tree, temperature):
    """Not even a greedy one does harm, whose siblings are no draws from a law."""
    target, draft = tables(4, "close")
    params, draft_params = SamplingParams(), SamplingParams(temperature=temperature)
    check_stream(target, draft, tree, rule, params, 2_400, length=301, draft_params=draft_params)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rule", "tree", "kind", "launch"),
    [
        (Rule.BLOCK, CHAIN, "close", "ahead"),
        (Rule.RECURSIVE_REJECTION, TREE, "unrelated", "ahead"),
        (Rule.BLOCK, CHAIN, "missing", "loop"),
    ],
)
def test_a_million_trials_through_captured_cycles(rule, tree, kind, launch):
    target, draft = tables(8, kind)
    check_stream(target.cuda(), draft.cuda(), tree, rule, SamplingParams(), 1_000_000, 4096, launch)


@pytest.mark.gpu
def test_captured_cycles_fail_the_test_when_misled(monkeypatch):
    honest = TextDraft.propose

    def tampered(self, state):
        honest(self, state)
        state.draft_logits.mul_(0.5)  # the law at another temperature than the one drawn from

    monkeypatch.setattr(TextDraft, "propose", tampered)
    target, draft = tables(8, "unrelated")
    with pytest.raises(AssertionError):
        check_stream(target.cuda(), draft.cuda(), CHAIN, Rule.BLOCK, SamplingParams(), 200_000, 4096)


# Planted mistakes that only the running system can show.


def test_one_random_stream_for_everything_is_caught(monkeypatch):
    """Draft, accept test and residual share their bits: a few percent of bias, found by the joint law."""
    honest = philox._blocks

    def shared(seed, position, stream, node, quad):
        return honest(seed, position, philox.Stream.DRAFT, node, quad)

    monkeypatch.setattr(philox, "_blocks", shared)
    target, draft = tables(8, "close")
    with pytest.raises(AssertionError):
        check(target, draft, CHAIN, Rule.TOKEN_LEVEL, SamplingParams(), 100_000)


def test_noise_reused_by_the_next_cycle_is_caught(monkeypatch):
    """Keyed by the token's own position, bottom-up rules would reuse draws they have already looked at."""
    honest = philox._blocks
    depths = torch.tensor(CHAIN.depths)

    def by_token(seed, position, stream, node, quad):
        depth = depths[node] + (0 if stream == philox.Stream.ACCEPT else 1)
        return honest(seed, position + depth, stream, torch.zeros_like(node), quad)

    monkeypatch.setattr(philox, "_blocks", by_token)
    target, draft = tables(8, "unrelated")
    with pytest.raises(AssertionError):
        check(target, draft, CHAIN, Rule.BLOCK, SamplingParams(), 300_000)


def test_q_stored_before_warping_is_caught(monkeypatch):
    """The draft samples at temperature 0.5 but verification is told the law at temperature 1."""
    honest = TextDraft.propose

    def tampered(self, state):
        honest(self, state)
        state.draft_logits.mul_(0.5)

    monkeypatch.setattr(TextDraft, "propose", tampered)
    target, draft = tables(8, "unrelated")
    with pytest.raises(AssertionError):
        check(target, draft, CHAIN, Rule.TOKEN_LEVEL, SamplingParams(temperature=0.5), 100_000)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["unrelated", "negated", "equal", "close", "onehot", "missing"])
@pytest.mark.parametrize(
    ("rule", "tree"),
    [case for case in CASES if case[0] is not Rule.TRAVERSAL],
    ids=lambda v: getattr(v, "value", None),
)
def test_the_kernels_sample_the_target(rule, tree, kind, backend, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", backend)
    target, draft = tables(8, kind)
    check(target.cuda(), draft.cuda(), tree, rule, SamplingParams(), 1_000_000)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("vocab_size", [16, 32])
def test_the_kernels_sample_warped_laws(vocab_size, backend, monkeypatch):
    monkeypatch.setenv("FASTSPEC_BACKEND", backend)
    target, draft = tables(vocab_size, "unrelated", seed=4)
    params = SamplingParams(temperature=0.8, top_k=12, top_p=0.9, min_p=0.02)
    for rule, tree in ((Rule.BLOCK, CHAIN), (Rule.RECURSIVE_REJECTION, TREE), (Rule.TARGET_ONLY, TREE)):
        check(target.cuda(), draft.cuda(), tree, rule, params, 1_000_000)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("trap", ["q before warping", "children re-sorted", "top-k children as if drawn"])
def test_the_kernels_fail_the_test_when_misled(trap, backend, monkeypatch):
    """Planted mistakes in what the kernels are handed must show in the joint law."""
    monkeypatch.setenv("FASTSPEC_BACKEND", backend)
    honest = TextDraft.propose

    def tampered(self, state):
        if trap == "top-k children as if drawn":
            heat = state.draft_sampling.temperature.clone()
            honest(self, state)
            drawn = state.draft_logits.clone()
            state.draft_sampling.temperature.zero_()
            honest(self, state)
            state.draft_sampling.temperature.copy_(heat)
            state.draft_logits.copy_(drawn)
            return
        honest(self, state)
        if trap == "q before warping":
            state.draft_logits.mul_(0.5)
        else:
            first = state.tree_tokens[:, 1:4]
            likely = state.draft_logits[:, 0].gather(1, first.clamp(min=0)).argsort(dim=1, descending=True)
            state.tree_tokens[:, 1:4] = first.gather(1, likely)

    monkeypatch.setattr(TextDraft, "propose", tampered)
    target, draft = tables(8, "unrelated")
    tree = DraftTree.kary((3,))
    params = SamplingParams(temperature=0.7)
    with pytest.raises(AssertionError):
        check(target.cuda(), draft.cuda(), tree, Rule.RECURSIVE_REJECTION, params, 200_000)
