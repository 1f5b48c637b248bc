"""The draft's own sampling: children for each inner node of a level, and the law they were drawn from."""

from __future__ import annotations

import torch

from fastspec.ops.backends import choose, current, extension
from fastspec.ops.checks import FLOATING, check_rows, check_sequences, check_sizes, check_tensor
from fastspec.ops.verify import (
    LOGIT_TYPES,
    MAX_VOCAB_SIZE,
    RULE_NUMBERS,
    kernel_rule,
    sampling_arguments,
    sampling_pointers,
)
from fastspec.philox import Stream, exponentials, race
from fastspec.sampling import SamplingTensors, valid_rows
from fastspec.tree import DraftTree
from fastspec.verification import Rule


class Proposer:
    """Draft sampling for one tree, batch size and vocabulary.

    Calling it launches one kernel (or runs the reference): no allocation and no synchronisation, so a CUDA graph
    can capture it.

    Args:
        tree: the draft tree.
        batch_size: B.
        vocab_size: V, the target's vocabulary.
        rule: the acceptance rule that the tokens are meant for.
        device: where the logits are.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: for sizes below 1, and for a backend that cannot run here.
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
        # What counts for the draft is how children are drawn; traversal draws as recursive rejection does.
        self._kernel_rule = kernel_rule(rule, tree) or Rule.RECURSIVE_REJECTION
        self.backend = choose(backend, self.device, vocab_size <= MAX_VOCAB_SIZE)

    def __call__(
        self,
        logits: torch.Tensor,
        level: int,
        tokens: torch.Tensor,
        draft_logits: torch.Tensor,
        sampling: SamplingTensors,
        positions: torch.Tensor,
    ) -> None:
        """See :func:`propose`."""
        self._check(logits, level, tokens, draft_logits, sampling, positions)
        if self.backend == "reference":
            reference(logits, level, self.tree, tokens, draft_logits, sampling, positions, self.rule)
            return
        launch = self._launch_triton if self.backend == "triton" else self._launch_cuda
        with current(self.device):
            launch(logits, level, tokens, draft_logits, sampling, positions)

    def _check(self, logits, level, tokens, draft_logits, sampling, positions) -> None:
        tree = self.tree
        if not 0 <= level < tree.max_depth:
            raise ValueError(f"level must be 0 to {tree.max_depth - 1}, got {level}")
        sizes = {
            "B": self.batch_size,
            "N": tree.num_nodes,
            "V": self.vocab_size,
            "N_inner": len(tree.inner),
            "R": len(tree.levels[level]),
        }
        exact = (torch.float64,) if self.backend == "reference" else ()
        check_tensor("logits", logits, "B R V_draft", sizes, (*FLOATING, *exact), self.device)
        check_tensor("tokens", tokens, "B N", sizes, (torch.int64,), self.device)
        check_tensor("draft_logits", draft_logits, "B N_inner V", sizes, (torch.float32, *exact), self.device)
        check_sequences(positions, sampling, sizes, self.device)
        check_rows("logits", logits)
        if not draft_logits.is_contiguous():
            raise ValueError(f"draft_logits must be contiguous, got strides {draft_logits.stride()}")
        if tokens.stride(1) != 1:
            raise ValueError(f"tokens must have contiguous rows, got strides {tokens.stride()}")

    def _launch_cuda(self, logits, level, tokens, draft_logits, sampling, positions) -> None:
        module, tree = extension(), self.tree
        rows = len(tree.levels[level])
        module.propose(
            logits.data_ptr(),
            LOGIT_TYPES[logits.dtype],
            logits.stride(1),
            draft_logits.data_ptr(),
            tokens.data_ptr(),
            tokens.stride(0),
            self._tables.table.data_ptr(),
            positions.data_ptr(),
            sampling_pointers(module, sampling),
            self.batch_size,
            tree.num_nodes,
            len(tree.inner),
            self.vocab_size,
            logits.shape[2],
            tree.inner_index[tree.levels[level][0]],
            rows,
            level,
            RULE_NUMBERS[self._kernel_rule],
            group_size(self.batch_size * rows, module.max_propose_group()),
            torch.cuda.current_stream(self.device).cuda_stream,
        )

    def _launch_triton(self, logits, level, tokens, draft_logits, sampling, positions) -> None:
        from fastspec.kernels.propose import BLOCK_SIZE, NUM_WARPS, propose_kernel

        tree = self.tree
        rows = len(tree.levels[level])
        propose_kernel[(self.batch_size * rows,)](
            logits,
            draft_logits,
            tokens,
            self._tables.table,
            positions,
            *sampling_arguments(sampling),
            logits.stride(1),
            tokens.stride(0),
            rows,
            len(tree.inner),
            tree.inner_index[tree.levels[level][0]],
            level,
            self.vocab_size,
            min(logits.shape[2], self.vocab_size),
            RULE=RULE_NUMBERS[self._kernel_rule],
            BLOCK=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )


def propose(
    logits: torch.Tensor,
    level: int,
    tree: DraftTree,
    tokens: torch.Tensor,
    draft_logits: torch.Tensor,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
    backend: str = "auto",
) -> None:
    """Draws the children of the inner nodes of one level.

    Children come in draw order: by Gumbel top-k without replacement under the ratio rules, by noise shared
    with the target under the drafter-invariant rule, and the most likely ones where sampling would not help
    (temperature 0, target-only). A child that the law cannot supply (support exhausted) is -1.

    Args:
        logits: ``[B, R, V_draft]`` raw draft logits of the level's inner nodes; ids from V_draft on have q = 0.
        level: depth of those nodes.
        tree: the draft tree.
        tokens: ``[B, N]`` int64, tree tokens; the level's children are written.
        draft_logits: ``[B, N_inner, V]`` float32, the rows of the level are written: warped log-weights whose
            softmax is q, the law sampled from.
        sampling: parameters and seeds.
        positions: ``[B]`` int64, the position of the root's successor.
        rule: the acceptance rule the tokens are meant for.
        backend: which implementation; see :func:`fastspec.ops.backends.choose`.

    Raises:
        TypeError, ValueError: for tensors that do not fit together.

    A row that defines no law (NaN, +inf, nothing finite) counts as uniform: the draft's law is free.
    A :class:`Proposer` keeps the choice of backend between calls.
    """
    proposer = Proposer(tree, logits.shape[0], draft_logits.shape[2], rule, logits.device, backend)
    proposer(logits, level, tokens, draft_logits, sampling, positions)


def reference(
    logits: torch.Tensor,
    level: int,
    tree: DraftTree,
    tokens: torch.Tensor,
    draft_logits: torch.Tensor,
    sampling: SamplingTensors,
    positions: torch.Tensor,
    rule: Rule,
) -> None:
    """The law in PyTorch: CPU path and test oracle."""
    nodes = tree.levels[level]
    rows = slice(tree.inner_index[nodes[0]], tree.inner_index[nodes[-1]] + 1)
    node_ids = tree.on(logits.device).inner[rows]
    vocab_size = draft_logits.shape[-1]
    logits = torch.nn.functional.pad(
        logits[..., :vocab_size], (0, max(0, vocab_size - logits.shape[-1])), value=float("-inf")
    )
    scores = sampling.penalise(logits, tree, node_ids, tokens, positions)
    scores = torch.where(valid_rows(scores)[..., None], scores, 0.0)
    log_weights = sampling.warp(scores).to(draft_logits.dtype)
    draft_logits[:, rows] = log_weights

    if rule is Rule.TARGET_ONLY or sampling.greedy:
        ranking = scores
    else:
        coupled = rule is Rule.DRAFTER_INVARIANT
        noise = exponentials(
            sampling.seed,
            (positions + level if coupled else positions)[:, None].expand(-1, len(nodes)),
            Stream.COUPLED if coupled else Stream.DRAFT,
            torch.zeros_like(node_ids) if coupled else node_ids,
            vocab_size,
        )
        drawn = race(log_weights.double().softmax(-1), noise)
        drawn = torch.where(drawn > 0, drawn, float("-inf"))
        ranking = torch.where(sampling.temperature[:, None, None] > 0, drawn, scores)

    width = min(max(len(tree.children[node]) for node in nodes), vocab_size)
    if width == 1:
        ids = ranking.argmax(-1, keepdim=True)
    else:
        ids = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    ids = torch.where(ranking.gather(-1, ids) > float("-inf"), ids, -1)
    for row, node in enumerate(nodes):
        for rank, child in enumerate(tree.children[node]):
            tokens[:, child] = ids[:, row, rank] if rank < width else -1


def group_size(groups: int, largest: int) -> int:
    """Blocks per group so that all groups run at once on a card of some 128 multiprocessors."""
    size = largest
    while size > 1 and groups * size > 128:
        size //= 2
    return size
