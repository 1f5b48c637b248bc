"""SpeculativeDecoder: prefill, then cycles of propose, check, accept and commit on preallocated buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fastspec.draft import Draft, make_draft
from fastspec.metrics import SpeculationRecord
from fastspec.model.passes import tree_pass
from fastspec.model.transformer import DecodeTransformer
from fastspec.model.vision import MULTIMODAL_MODELS, Prompt, is_multimodal, text_stack
from fastspec.ops import Verifier
from fastspec.ops.commit import Committer
from fastspec.runtime import Loop, Reports, asked_memory, capture, loop_obstacle
from fastspec.sampling import SamplingParams
from fastspec.state import REPORT_HEADER, DecodeState, FinishReason
from fastspec.tree import DraftTree, check_gamma
from fastspec.verification import Rule
from fastspec.vocabulary import check_vocabularies

MAX_BATCH_SIZE = 8
DEFAULT_GAMMA = 5
#: Cycles that a GPU has queued while the host looks at what the ones before committed.
CYCLES_AHEAD = 2
LAUNCHES = ("ahead", "loop")

#: Changes target logits ``[B, R, V]`` at tree nodes before they become a law: (state, tree, logits) -> logits.
LogitsHook = Callable[[DecodeState, DraftTree, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt: the prompt with its image features.
        max_new_tokens: most tokens to append.
        params: how the target samples.
        draft_params: how the draft samples, if not like the target; any choice leaves the law alone.
        seed: key of the sequence's random numbers, modulo 2**64.
        eos_token_ids: tokens that end it.
        padding_ids: tokens outside the prompt that the repetition penalty counts as seen all the same.
    """

    prompt: Prompt
    max_new_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    draft_params: SamplingParams | None = None
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    padding_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Commitment:
    """What one cycle committed, read by the host.

    Attributes:
        tokens: the new tokens of each sequence.
        num_drafted: how many of them, from the first on, were drafted.
        reasons: each sequence's finish reason so far.
    """

    tokens: list[list[int]]
    num_drafted: list[int]
    reasons: list[FinishReason]


class SpeculativeDecoder:
    """A target and a draft, with static buffers that serve any number of requests.

    Without a draft it decodes plainly: the same cycle with a tree of one node. On a GPU the first generation
    captures the cycle as a CUDA graph, which serves every later one, whatever its prompts and parameters.

    Args:
        target: a LLaVA-shaped model of transformers.
        draft: what :func:`fastspec.draft.make_draft` takes, or None for plain decoding.
        gamma: length of the draft chain, at least 1; 5 unless given.
        tree: a :class:`DraftTree` instead of a chain.
        rule: an acceptance :class:`Rule` or its name; by default block verification on a chain, recursive
            rejection on a tree, target-only for a draft without a law.
        batch_size: sequences decoded together, 1 to 8.
        capacity: most tokens of a sequence, prompt, image and answer together; the target's
            ``max_position_embeddings`` unless given.
        tokenizer, draft_tokenizer: the vocabularies to compare; without them their sizes are.
        launch: how a GPU gets its cycles. ``"ahead"``: the host launches them one by one, two ahead of what it
            has read; without a graph it launches their parts. ``"loop"``: one launch for the whole generation,
            repeated by the device itself; needs the cycle in a graph, the CUDA kernels, and CUDA 12.4.

    Raises:
        TypeError: for a target or draft that is no such model.
        ValueError: for arguments that do not fit together, and for a loop that cannot run here; the message
            names expected and given, or the reason.
        MemoryError: if the GPU has too little memory free; nothing stays allocated.
    """

    def __init__(
        self,
        target: nn.Module,
        draft: object,
        *,
        gamma: int | None = None,
        tree: DraftTree | None = None,
        rule: Rule | str | None = None,
        batch_size: int = 1,
        capacity: int | None = None,
        tokenizer: object = None,
        draft_tokenizer: object = None,
        launch: str = "ahead",
    ):
        if launch not in LAUNCHES:
            raise ValueError(f"launch must be {' or '.join(map(repr, LAUNCHES))}, got {launch!r}")
        self.launch = launch
        # A copy, so that the buffers of another decoder with the same draft stay its own.
        self.draft = None if draft is None else copy.copy(make_draft(draft))
        self.tree = resolve_tree(self.draft, gamma, tree)
        self.rule = check_pair(target, self.draft, self.tree, rule, tokenizer, draft_tokenizer)
        self.target = DecodeTransformer(*text_stack(target))
        if not 1 <= batch_size <= MAX_BATCH_SIZE:
            raise ValueError(f"batch_size must be 1 to {MAX_BATCH_SIZE}, got {batch_size}")
        if capacity is None:
            capacity = self.target.max_positions
        if not 1 < capacity <= self.target.max_positions:
            raise ValueError(
                f"capacity must be 2 to {self.target.max_positions}, the target's max_position_embeddings, "
                f"got {capacity}"
            )
        self._allocate(batch_size, capacity)

    def _allocate(self, batch_size: int, capacity: int) -> None:
        """Makes all that depends on the sizes, for the target, draft, tree and rule that are set."""
        self.batch_size, self.capacity = batch_size, capacity
        device = self.target.device
        # Else buffers made in inference mode could never be written outside of it.
        with asked_memory(device), torch.inference_mode(False):
            self.state = DecodeState(batch_size, capacity, self.tree, self.target.vocab_size, device)
            self.cache = self.target.new_cache(batch_size, capacity + self.tree.num_nodes)
            shape = (batch_size, self.target.vocab_size, self.rule, device)
            if self.draft is not None:
                self.draft.allocate(batch_size, capacity, self.tree, *shape[1:])
            self._pass = tree_pass(self.target, self.cache, self.tree.on(device).mask)
            self._verifier = Verifier(self.tree, *shape)
            self._first_verifier = Verifier(DraftTree.chain(0), *shape)
            self._reports = Reports(self.state.report, CYCLES_AHEAD)
        self._commit = Committer(self.state, self.cache)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_results: tuple[torch.Tensor, torch.Tensor] | None = None
        self._loop: Loop | None = None
        self._stopped: set[int] = set()
        self._generations = 0
        #: A hook needs the host in every cycle, which then runs uncaptured.
        self.logits_hook: LogitsHook | None = None
        #: Raw target logits of the last pass ``[B, R, V]``, and the nodes of the path it committed.
        self.last_logits: torch.Tensor | None = None
        self.last_path: torch.Tensor | None = None
        self._check_launch()

    @torch.no_grad()
    def prefill(self, requests: Sequence[Request]) -> None:
        """Reads the prompts and commits the first token of each answer.

        Raises:
            ValueError: for too many requests, an empty prompt, or one that does not fit the capacity.
        """
        self._check_requests(requests)
        self._generations += 1
        self._reports.clear()
        if self._loop is not None:
            self._loop.end()
        self._stopped.clear()
        self.state.clear()
        first_logits = self.target.lm_head.new_zeros(self.batch_size, 1, self.target.vocab_size)
        for row, request in enumerate(requests):
            prompt = request.prompt
            self.state.admit(
                row,
                prompt.input_ids,
                prompt.num_tokens + request.max_new_tokens,
                request.params,
                self._draft_params(request),
                request.seed,
                request.eos_token_ids,
                request.padding_ids,
            )
            hidden = self.target.prefill(prompt.embeddings(self.target), self.cache, row)
            first_logits[row] = self.target.logits(hidden[-1:])
            if self.draft is not None:
                self.draft.prefill(row, prompt)
        self._accept(first_logits, DraftTree.chain(0), first=True)

    def _draft_params(self, request: Request) -> SamplingParams:
        """How the draft of a sequence samples: as a law that the rule can weigh, wherever it weighs one."""
        chosen = request.draft_params or request.params
        if self.rule.needs_draft_law and chosen.temperature == 0 < request.params.temperature:
            # A greedy draft's second choices are no draws from q: the ratio rules are exact without them only.
            return replace(chosen, temperature=1.0, top_k=1)
        return chosen

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the cycle: on a GPU, with kernels for its rule, and no hook."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """What keeps the cycle out of a CUDA graph; None if nothing does."""
        if self.target.device.type != "cuda":
            return f"the target is on {self.target.device}, not on a GPU"
        if self.logits_hook is not None:
            return "a logits hook needs the host in every cycle"
        if self._verifier.backend == "reference":
            return f"verification by {self.rule.value!r} runs as the reference here, not as a kernel"
        if self.draft is not None and not self.draft.capturable:
            return f"{type(self.draft).__name__} cannot propose without the host here"
        return None

    def _check_launch(self) -> None:
        """Raises ValueError, saying why, if cycles cannot be launched as asked for."""
        reason = (self._obstacle() or loop_obstacle()) if self.launch == "loop" else None
        if reason is not None:
            raise ValueError(f"launch='loop' cannot run here: {reason}")

    @torch.no_grad()
    def capture(self) -> None:
        """Captures the cycle as a CUDA graph, if that is possible and has not been done; ends all sequences."""
        if self._graph is None and self.capturable:
            self.state.clear()  # the cycles of finished sequences change nothing
            looped = self.launch == "loop"
            with asked_memory(self.target.device), torch.inference_mode(False):
                graph = capture(self._cycle, self.target.device, keep=looped)
                if looped:
                    self._loop = Loop(graph, self.state, self.capacity)
            self._graph, self._graph_results = graph, (self.last_logits, self.last_path)

    def cycle(self) -> None:
        """One cycle for all sequences: a straight line on the device, with no decision of the host's."""
        if self._graph is not None and self.logits_hook is None:
            self._graph.replay()
            self.last_logits, self.last_path = self._graph_results
        else:
            self._cycle()

    @torch.no_grad()
    def _cycle(self) -> None:
        state = self.state
        if self.draft is not None:
            self.draft.propose(state)
        self._accept(self._pass(state.tree_tokens, state.num_tokens - 1), self.tree)

    def _accept(self, logits: torch.Tensor, tree: DraftTree, first: bool = False) -> None:
        state = self.state
        self.last_logits = logits
        if self.logits_hook is not None:
            logits = self.logits_hook(state, tree, logits)
        verifier = self._first_verifier if first else self._verifier
        tokens = state.tree_tokens[:, : tree.num_nodes]
        verdict = verifier(logits, tokens, state.sampling, state.num_tokens, state.draft_logits)
        self.last_path = verdict.path
        self._commit(verdict, first=first)

    def poll(self) -> Commitment:
        """Reads what the last cycle committed; waits for the device."""
        return read_report(self.state.report.tolist())

    def stop(self, row: int) -> None:
        """Ends a sequence from the host; cycles that are under way may still commit to it."""
        self._stopped.add(row)
        if self._loop is not None:
            self._loop.stop(row)
        self.state.reason[row].fill_(FinishReason.STOPPED)  # after the cycles, or the loop, under way

    def stream(self, requests: Sequence[Request], ahead: int = CYCLES_AHEAD) -> Iterator[Commitment]:
        """Generates, yielding what the prefill and each cycle committed until all sequences are finished.

        Abandoning the iterator leaves the decoder usable, and wastes at most the cycles under way. It cannot go on
        once another generation has begun on this decoder.

        Args:
            requests: the sequences, at most ``batch_size``.
            ahead: most cycles queued on a GPU at a time, 1 or 2. With 1, ``last_logits`` and ``last_path`` belong
                to the commitment that was yielded last. A loop runs as far ahead as it likes and takes no other
                number.

        Raises:
            ValueError: for another number of cycles, for a logits hook in a loop, and as :meth:`prefill` does.
            RuntimeError: if another generation has begun since the last commitment.
        """
        if ahead not in range(1, CYCLES_AHEAD + 1):
            raise ValueError(f"ahead must be 1 to {CYCLES_AHEAD}, got {ahead!r}")
        if self.launch == "loop" and ahead != CYCLES_AHEAD:
            raise ValueError(f"launch='loop' runs ahead of the host as far as it can, got ahead={ahead}")
        self._check_launch()
        self.capture()
        self.prefill(requests)
        generation = self._generations
        commitment = self.poll()
        yield commitment
        if self._graph is None or self.logits_hook is not None:
            ahead = 1
        room = [request.max_new_tokens for request in requests]
        looping = False
        try:
            while True:
                if self._generations != generation:
                    raise RuntimeError("another generation has begun on this decoder; this one cannot go on")
                for row, tokens in enumerate(commitment.tokens[: len(room)]):
                    room[row] -= len(tokens)
                    if row in self._stopped or commitment.reasons[row] != FinishReason.RUNNING:
                        room[row] = 0
                if not any(room):
                    return
                # A cycle commits at least one token to each running sequence: more cycles than the longest has
                # room for cannot be needed.
                if self.launch == "loop":
                    if not looping:
                        self._loop.launch(max(room))
                        looping = True
                    commitment = read_report(self._loop.pop())
                else:
                    while len(self._reports) < min(ahead, max(room)):
                        self.cycle()
                        self._reports.push()
                    commitment = read_report(self._reports.pop())
                yield commitment
        finally:
            if looping and self._generations == generation:
                self._loop.end()

    def record(self, num_requests: int | None = None) -> SpeculationRecord:
        """Statistics of the generation so far.

        Cycles that a GPU had queued when the host stopped a sequence count, though nobody saw their tokens. While
        a loop runs, this waits for its end.
        """
        rows = slice(0, num_requests)
        return SpeculationRecord(
            num_nodes=self.tree.num_nodes,
            draft_passes=self.tree.max_depth,
            cycles=tuple(self.state.cycles[rows].tolist()),
            committed=tuple(self.state.committed[rows].tolist()),
            accepted=tuple(map(tuple, self.state.accepted[rows].tolist())),
            finish_reasons=tuple(FinishReason(reason) for reason in self.state.reason[rows].tolist()),
            cost_ratio=0.0 if self.draft is None else self.draft.num_bytes / self.target.num_bytes,
        )

    def _check_requests(self, requests: Sequence[Request]) -> None:
        if not 1 <= len(requests) <= self.batch_size:
            raise ValueError(
                f"expected 1 to {self.batch_size} requests (the decoder's batch_size), got {len(requests)}"
            )
        for row, request in enumerate(requests):
            length, new = request.prompt.num_tokens, request.max_new_tokens
            if length < 1:
                raise ValueError(f"prompt {row} is empty")
            if new < 1:
                raise ValueError(f"max_new_tokens must be at least 1, got {new}")
            if length + new > self.capacity:
                raise ValueError(
                    f"prompt {row} has {length} tokens and asks for {new} new ones, {length + new} in all, "
                    f"but the capacity is {self.capacity}"
                )
            if self.draft is not None:
                self.draft.check(request.prompt)


def read_report(report: Sequence[Sequence[int]]) -> Commitment:
    """The commitment that ``DecodeState.report`` describes."""
    return Commitment(
        tokens=[row[REPORT_HEADER : REPORT_HEADER + row[0]] for row in report],
        num_drafted=[row[1] for row in report],
        reasons=[FinishReason(row[2]) for row in report],
    )


def check_target(target: object) -> None:
    """Raises TypeError unless the target is a LLaVA-shaped model that is supported."""
    if not is_multimodal(target) or not hasattr(target, "lm_head"):
        kind = getattr(getattr(target, "config", None), "model_type", None)
        given = type(target).__name__ + (f" (model_type {kind!r})" if kind else "")
        raise TypeError(f"target must be a LLaVA-shaped model ({', '.join(MULTIMODAL_MODELS)}), got {given}")


def check_pair(
    target: nn.Module,
    draft: Draft | None,
    tree: DraftTree,
    rule: Rule | str | None,
    tokenizer: object = None,
    draft_tokenizer: object = None,
) -> Rule:
    """The rule for a target and a draft, or an error if they do not go together."""
    check_target(target)
    resolved = resolve_rule(draft, tree, rule)
    transformer = getattr(draft, "transformer", None)
    if transformer is not None:
        if transformer.device != target.device:
            raise ValueError(
                f"draft and target must be on one device, got {transformer.device} and {target.device}"
            )
        size = text_stack(target)[1].weight.shape[0]
        check_vocabularies(size, transformer.vocab_size, tokenizer, draft_tokenizer)
    return resolved


def resolve_tree(draft: Draft | None, gamma: int | None, tree: DraftTree | None) -> DraftTree:
    """The draft tree that the arguments ask for."""
    if gamma is not None and tree is not None:
        raise ValueError("pass gamma or tree, not both")
    if draft is None:
        if gamma or (tree is not None and tree.num_nodes > 1):
            raise ValueError("a draft tree needs a draft, got draft=None")
        return DraftTree.chain(0)
    if tree is not None:
        if not isinstance(tree, DraftTree):
            raise TypeError(f"tree must be a fastspec.DraftTree, got {type(tree).__name__}")
        if tree.num_nodes < 2:
            raise ValueError("the draft tree must have at least one node besides its root")
        if draft.chains_only and not tree.is_chain:
            raise ValueError(
                f"this draft proposes a chain, got a tree of {tree.num_nodes} nodes with siblings"
            )
        return tree
    gamma = DEFAULT_GAMMA if gamma is None else gamma
    check_gamma(gamma, least=1)
    return DraftTree.chain(gamma)


def resolve_rule(draft: Draft | None, tree: DraftTree, rule: Rule | str | None) -> Rule:
    """The acceptance rule that fits draft and tree, or the one asked for if it does."""
    deterministic = draft is not None and draft.deterministic
    if rule is None:
        if deterministic:
            return Rule.TARGET_ONLY
        return Rule.BLOCK if tree.is_chain else Rule.RECURSIVE_REJECTION
    try:
        rule = Rule(rule)
    except ValueError:
        names = ", ".join(repr(one.value) for one in Rule)
        raise ValueError(f"unknown rule {rule!r}; expected one of {names}") from None
    rule.check(tree)
    if deterministic and rule.needs_draft_law:
        raise ValueError(
            f"rule {rule.value!r} needs the law the draft sampled from, and this draft has none; "
            f"use {Rule.TARGET_ONLY.value!r} or {Rule.DRAFTER_INVARIANT.value!r}"
        )
    return rule
