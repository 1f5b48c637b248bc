"""From the target's logits of all tree nodes to the accepted path and the next token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastspec.ops.backends import choose, current, extension
from fastspec.ops.checks import FLOATING, check_rows, check_sequences, check_sizes, check_tensor
from fastspec.philox import Stream, accept_uniforms, exponentials, race
from fastspec.sampling import SamplingTensors, valid_rows
from fastspec.tree import ROWS_AT_ONCE, DraftTree
from fastspec.verification import Rule, matching, recursive_rejection, traversal, walk_down, walk_up

MAX_VOCAB_SIZE = 262_144
#: Of a node of a tree that the CUDA kernel reads at once (csrc/tree.cuh): a lane for each.
MAX_CHILDREN = 32
#: Numbers of the rules and element types in csrc/params.h.
RULE_NUMBERS = {
    Rule.TOKEN_LEVEL: 0,
    Rule.BLOCK: 1,
    Rule.RECURSIVE_REJECTION: 2,
    Rule.TARGET_ONLY: 3,
    Rule.DRAFTER_INVARIANT: 4,
}
LOGIT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Verdict(NamedTuple):
    """What verification decides for each sequence.

    Attributes:
        path: ``[B, D + 1]`` int64, the nodes from the root to where the path stops, padded with that node.
        num_accepted: ``[B]`` int64, drafted tokens on the path.
        next_token: ``[B]`` int64, the token after the path; -1 where ``invalid``.
        invalid: ``[B]`` bool, the path stopped at a node whose logits define no law.
    """

    path: torch.Tensor
    num_accepted: torch.Tensor
    next_token: torch.Tensor
    invalid: torch.Tensor


def kernel_rule(rule: Rule, tree: DraftTree) -> Rule | None:
    """The rule by which the kernels would verify, or None if only the reference knows it."""
    if rule is Rule.TRAVERSAL:
        return Rule.BLOCK if tree.is_chain else None
    return rule


class Verifier:
    """Verification for one tree, batch size and vocabulary, on preallocated buffers.

    Calling it launches one kernel (or runs the reference): no allocation and no synchronisation, so a CUDA graph
    can capture it. The returned tensors are the same at every call. Calls must not overlap in time, on other streams
    or by a shallow copy: the blocks of a launch would take each other's messages, and wait for ever.

    Args:
        tree: the draft tree.
        batch_size: B, 1 to 64 for the kernels.
        vocab_size: V, up to 262144 for the kernels.
        rule: the acceptance rule.
        device: where the logits are.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: for sizes below 1, and for a backend that cannot run here or does not know the case.
    """

    def __init__(
        self,
        tree: DraftTree,
        batch_size: int,
        vocab_size: int,
        rule: Rule,
        device: torch.device | str,
        backend: str = "auto",
    ):
        rule.check(tree)
        check_sizes(batch_size, vocab_size)
        self.tree, self.rule = tree, rule
        self.batch_size, self.vocab_size = batch_size, vocab_size
        self.device = torch.empty(0, device=device).device  # with its index
        self._tables = tree.on(self.device)  # a captured graph knows only where it lies
        self._kernel_rule = kernel_rule(rule, tree)
        supported = self._kernel_rule is not None and vocab_size <= MAX_VOCAB_SIZE
        self.backend = choose(backend, self.device, supported)
        if self.backend == "reference":
            return

        def empty(*shape, dtype=torch.int64):
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._verdict = Verdict(
            empty(batch_size, tree.max_depth + 1),
            empty(batch_size),
            empty(batch_size),
            empty(batch_size, dtype=torch.bool),
        )
        if self.backend == "triton":
            rows = tree.num_nodes + len(tree.inner)
            self._arrivals = empty(batch_size, dtype=torch.int32)
            self._stats = empty(batch_size, rows, 8, dtype=torch.float64)
            return
        with torch.cuda.device(self.device):
            self._group_size = extension().verify_group_size(batch_size, vocab_size)
        self._rows_at_once = min(ROWS_AT_ONCE, tree.num_nodes + len(tree.inner))
        self._root_ahead = tree.ahead(0)
        few_children = max(map(len, tree.children)) <= MAX_CHILDREN
        self._inner_nodes = bytes(tree.inner) if few_children else b""
        messages = extension().verify_mail_size(self._rows_at_once, vocab_size)
        self._mail = empty(batch_size, messages, 2)
        #: Where the kernel notes the cycles at each mark (csrc/params.h); for measuring only.
        self.clock: torch.Tensor | None = None

    def __call__(
        self,
        target_logits: torch.Tensor,
        tokens: torch.Tensor,
        sampling: SamplingTensors,
        positions: torch.Tensor,
        draft_logits: torch.Tensor | None = None,
    ) -> Verdict:
        """See :func:`verify`."""
        self._check(target_logits, tokens, sampling, positions, draft_logits)
        if not self.rule.needs_draft_law or self.tree.num_nodes == 1:
            draft_logits = None
        if self.backend == "reference":
            return reference(target_logits, tokens, self.tree, sampling, positions, self.rule, draft_logits)
        launch = self._launch_triton if self.backend == "triton" else self._launch_cuda
        with current(self.device):
            launch(target_logits, tokens, sampling, positions, draft_logits)
        return self._verdict

    def _check(self, target_logits, tokens, sampling, positions, draft_logits) -> None:
        tree = self.tree
        sizes = {"B": self.batch_size, "N": tree.num_nodes, "V": self.vocab_size, "N_inner": len(tree.inner)}
        exact = (torch.float64,) if self.backend == "reference" else ()
        check_tensor("target_logits", target_logits, "B N V", sizes, (*FLOATING, *exact), self.device)
        check_tensor("tokens", tokens, "B N", sizes, (torch.int64,), self.device)
        check_sequences(positions, sampling, sizes, self.device)
        check_rows("target_logits", target_logits)
        if self.rule.needs_draft_law and tree.num_nodes > 1:
            if draft_logits is None:
                raise ValueError(f"rule {self.rule.value!r} needs draft_logits, got None")
            check_tensor(
                "draft_logits", draft_logits, "B N_inner V", sizes, (torch.float32, *exact), self.device
            )
            if not draft_logits.is_contiguous():
                raise ValueError(f"draft_logits must be contiguous, got strides {draft_logits.stride()}")
        if tokens.shape[1] > 1 and tokens.stride(1) != 1:
            raise ValueError(f"tokens must have contiguous rows, got strides {tokens.stride()}")

    def _launch_cuda(self, target_logits, tokens, sampling, positions, draft_logits) -> None:
        tree, verdict = self.tree, self._verdict
        module = extension()
        module.verify(
            target_logits.data_ptr(),
            LOGIT_TYPES[target_logits.dtype],
            target_logits.stride(1),
            0 if draft_logits is None else draft_logits.data_ptr(),
            tokens.data_ptr(),
            tokens.stride(0),
            self._tables.table.data_ptr(),
            positions.data_ptr(),
            sampling_pointers(module, sampling),
            *(tensor.data_ptr() for tensor in verdict),
            self.batch_size,
            tree.num_nodes,
            len(tree.inner),
            tree.max_depth,
            self.vocab_size,
            *self._root_ahead,
            self._inner_nodes,
            RULE_NUMBERS[self._kernel_rule],
            self._group_size,
            self._mail.data_ptr(),
            self._rows_at_once,
            0 if self.clock is None else self.clock.data_ptr(),
            torch.cuda.current_stream(self.device).cuda_stream,
        )

    def _launch_triton(self, target_logits, tokens, sampling, positions, draft_logits) -> None:
        from fastspec.kernels.verify import BLOCK_SIZE, NODE_SIZES, NUM_WARPS, verify_kernel

        tree = self.tree
        needs_draft = draft_logits is not None
        rows = tree.num_nodes + (len(tree.inner) if needs_draft else 0)
        verify_kernel[(self.batch_size * rows,)](
            target_logits,
            draft_logits if needs_draft else target_logits,
            tokens,
            self._tables.table,
            positions,
            *sampling_arguments(sampling),
            self._stats,
            self._arrivals,
            *self._verdict,
            target_logits.stride(1),
            tokens.stride(0),
            rows,
            self.vocab_size,
            tree.num_nodes,
            len(tree.inner),
            tree.max_depth,
            RULE=RULE_NUMBERS[self._kernel_rule],
            NEEDS_DRAFT=needs_draft,
            NODES=next(size for size in NODE_SIZES if size >= tree.num_nodes),
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS[RULE_NUMBERS[self._kernel_rule]],
        )


def verify(
    target_logits: torch.Tensor,
    tokens: torch.Tensor,
    tree: DraftTree,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
    draft_logits: torch.Tensor | None = None,
    backend: str = "auto",
) -> Verdict:
    """Accepts a path of the draft tree so that the emitted tokens have exactly the target's law.

    Args:
        target_logits: ``[B, N, V]`` raw logits of the tree's nodes, float32, bfloat16 or float16.
        tokens: ``[B, N]`` int64, the root and the drafted tokens, -1 where there is none.
        tree: the draft tree.
        sampling: parameters and seeds of the B sequences.
        positions: ``[B]`` int64, the position of the root's successor.
        rule: the acceptance rule.
        draft_logits: ``[B, N_inner, V]`` float32 with softmax q, as :func:`fastspec.ops.propose` writes them;
            None where the rule does not weigh q. Above temperature 0, tokens must be drawn from it: the later
            siblings of a greedy draft, to which q gives nothing, are accepted as if they were certain.
        backend: which implementation; see :func:`fastspec.ops.backends.choose`.

    Returns:
        A :class:`Verdict`. Rows of the logits off the path never matter; a draft row that defines no law
        counts as having proposed nothing.

    Raises:
        TypeError, ValueError: for tensors that do not fit together.

    A :class:`Verifier` does the same without making buffers at every call.
    """
    batch_size, _, vocab_size = target_logits.shape
    verifier = Verifier(tree, batch_size, vocab_size, rule, target_logits.device, backend)
    return verifier(target_logits, tokens, sampling, positions, draft_logits)


def reference(
    target_logits: torch.Tensor,
    tokens: torch.Tensor,
    tree: DraftTree,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
    draft_logits: torch.Tensor | None,
) -> Verdict:
    """The law in PyTorch: CPU path, test oracle, and every rule over every tree."""
    tables = tree.on(target_logits.device)
    node_ids = torch.arange(tree.num_nodes, device=target_logits.device)
    scores = sampling.penalise(target_logits, tree, node_ids, tokens, positions)
    valid = valid_rows(scores)
    scores = torch.where(valid[..., None], scores, 0.0)
    p = torch.where(valid[..., None], sampling.warp(scores).softmax(-1), 0.0)
    vocab_size = p.shape[-1]

    if draft_logits is not None:
        # A draft row that is no law proposed nothing; at temperature 0 its tokens count all the same.
        law_known = valid_rows(draft_logits)
        q = torch.where(law_known[..., None], draft_logits.double().softmax(-1), 0.0)
        usable = torch.ones_like(tokens, dtype=torch.bool)
        usable[:, 1:] = (law_known | (sampling.temperature == 0)[:, None])[:, tables.inner_rows[1:]]
        tokens = torch.where(usable, tokens, -1)
        if rule.bottom_up:
            h, emission = traversal(tree, tokens, p, q, valid)
        else:
            h, emission = recursive_rejection(tree, tokens, p, q)
        accepted = accept_uniforms(sampling.seed, positions, node_ids) <= h
        stop = walk_up(tree, accepted) if rule.bottom_up else walk_down(tree, accepted)
        law = emission.gather(1, stop[:, None, None].expand(-1, 1, vocab_size))[:, 0]
        if not sampling.greedy:
            noise = exponentials(sampling.seed, positions[:, None], Stream.EMIT, stop[:, None], vocab_size)
            law = race(law, noise[:, 0])
        next_token = law.argmax(-1)
    else:
        coupled = rule is Rule.DRAFTER_INVARIANT
        ranking = p
        if not sampling.greedy:
            noise = exponentials(
                sampling.seed,
                positions[:, None] + (tables.depths if coupled else torch.zeros_like(tables.depths)),
                Stream.COUPLED if coupled else Stream.TARGET,
                torch.zeros_like(node_ids) if coupled else node_ids,
                vocab_size,
            )
            ranking = race(p, noise)
        samples = torch.where(valid, ranking.argmax(-1), -1)
        stop = matching(tree, tokens, samples)
        next_token = samples.gather(1, stop[:, None])[:, 0]

    invalid = ~valid.gather(1, stop[:, None])[:, 0]
    return Verdict(
        path=tables.paths[stop],
        num_accepted=tables.depths[stop],
        next_token=torch.where(invalid, -1, next_token),
        invalid=invalid,
    )


def sampling_arguments(sampling: SamplingTensors) -> tuple[torch.Tensor, ...]:
    """The tensors that the kernels take, in the order of csrc/params.h."""
    return (
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.min_tokens,
        sampling.seed,
        sampling.eos_token_ids,
        sampling.seen.view(torch.uint8),
    )


def sampling_pointers(module, sampling: SamplingTensors):
    """The same as a parameter struct of the extension."""
    return module.SamplingParams(*(tensor.data_ptr() for tensor in sampling_arguments(sampling)))
