"""Which chain or tree to draft: from measured acceptance and the cost of passes."""

from __future__ import annotations

import heapq
import time
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fastspec.decoder import DEFAULT_GAMMA, Request, SpeculativeDecoder
from fastspec.metrics import SpeculationRecord, memory_bound_speedup
from fastspec.model.passes import tree_pass
from fastspec.model.transformer import DecodeTransformer
from fastspec.state import FinishReason
from fastspec.tree import MAX_NODES, DraftTree

#: The longest chain, and the deepest tree, that is considered.
MAX_DEPTH = 16
#: A longer or shorter chain must promise so much more speed than the present one: a new graph is not free.
WORTH_A_CHANGE = 1.03
#: What a pair that nobody has measured is taken to have seen: so many drafted tokens, accepted at this rate.
_PRIOR_TRIALS, _PRIOR_RATE = 8.0, 0.6


def choose_tree(
    acceptance: Sequence[Sequence[float]],
    pass_costs: Mapping[int, float],
    draft_cost: float,
    max_nodes: int = 64,
) -> DraftTree:
    """The draft tree that promises most tokens per time.

    A node is worth the probability that all of its path is accepted; a tree of N nodes is best if it has the N
    worthiest, which a walk in order of worth finds for every depth. Among the trees, that with the most expected
    tokens per cost of a cycle is taken.

    Args:
        acceptance: ``acceptance[d][k]`` is the probability that the child drawn as k-th of an accepted node at depth
            d is the one that is accepted. No deeper or wider tree is considered. Should fall with k.
        pass_costs: what a target pass over so many nodes costs; between two sizes the larger one counts.
        draft_cost: what a draft pass costs, in the same unit; a tree needs one per level.
        max_nodes: most nodes, the root included, at most 128.

    Raises:
        ValueError: for no acceptance, values that are no probabilities, or costs that are not positive.

    Source: Chen et al., Sequoia, 2402.12374, section 3.
    """
    if not acceptance or not all(acceptance):
        raise ValueError("acceptance must have an entry for at least one child at each depth")
    if not all(0 <= value <= 1 for row in acceptance for value in row):
        raise ValueError(f"acceptance must be probabilities, got {acceptance}")
    if not 2 <= max_nodes <= MAX_NODES:
        raise ValueError(f"max_nodes must be 2 to {MAX_NODES}, got {max_nodes}")
    if not pass_costs or not all(cost > 0 for cost in (*pass_costs.values(), draft_cost)):
        raise ValueError(f"costs must be positive, got {dict(pass_costs)} and {draft_cost}")
    sizes = sorted(pass_costs)
    if sizes[-1] < max_nodes:
        raise ValueError(f"pass_costs must reach max_nodes={max_nodes}, got sizes {sizes}")

    best, best_rate = None, 0.0
    for depth in range(1, min(len(acceptance), MAX_DEPTH) + 1):
        expected, levels, children = 1.0, 0, [[]]
        for worth, parent, level in _worthiest(acceptance[:depth], children, max_nodes - 1):
            children[parent].append(len(children))
            children.append([])
            expected, levels = expected + worth, max(levels, level)
            cost = pass_costs[next(size for size in sizes if size >= len(children))]
            rate = expected / (cost + draft_cost * levels)
            if rate > best_rate:
                best, best_rate = [list(own) for own in children], rate
    return DraftTree.from_children(best)


def _worthiest(acceptance, children, count):
    """(worth, parent, depth) of the nodes below the root in falling order of worth.

    The caller adds each to ``children``.
    """
    frontier = [(-acceptance[0][0], 0, 0, 0, 1.0)]  # minus the worth, parent, rank, depth, the parent's worth
    for _ in range(count):
        if not frontier:
            return
        minus, parent, rank, depth, above = heapq.heappop(frontier)
        node = len(children)
        yield -minus, parent, depth + 1
        if rank + 1 < len(acceptance[depth]):
            heapq.heappush(frontier, (-above * acceptance[depth][rank + 1], parent, rank + 1, depth, above))
        if depth + 1 < len(acceptance):
            heapq.heappush(frontier, (minus * acceptance[depth + 1][0], node, 0, depth + 1, -minus))


def measure_acceptance(decoder: SpeculativeDecoder, requests: Sequence[Request]) -> list[list[float]]:
    """Acceptance by depth and rank, as :func:`choose_tree` takes it, from generating the requests.

    Args:
        decoder: its tree says which depths and ranks are seen.
        requests: any number, decoded ``batch_size`` at a time.
    """
    tree = decoder.tree
    width = [max((len(tree.children[node]) for node in level), default=0) for level in tree.levels]
    trials, successes = [0] * len(width), [[0] * ranks for ranks in width]
    for first in range(0, len(requests), decoder.batch_size):
        some = requests[first : first + decoder.batch_size]
        stream = decoder.stream(some, ahead=1)
        before = next(stream).reasons
        for commitment in stream:
            paths = decoder.last_path.tolist()
            for row in range(len(some)):
                if before[row] == FinishReason.RUNNING:
                    _count(tree, paths[row], trials, successes)
            before = commitment.reasons
    return [
        [count / max(1, tried) for count in counts] for tried, counts in zip(trials, successes, strict=True)
    ]


def _count(tree: DraftTree, path: Sequence[int], trials: list[int], successes: list[list[int]]) -> None:
    """One walk down the tree; ``path`` repeats the node where it stopped."""
    for depth, (node, following) in enumerate(zip(path, [*path[1:], path[-1]], strict=True)):
        if not tree.children[node]:
            return
        trials[depth] += 1
        if following == node:
            return
        successes[depth][tree.children[node].index(following)] += 1


@torch.no_grad()
def measure_pass_costs(
    transformer: DecodeTransformer,
    sizes: Sequence[int] = (1, 8, 16, 32, 64),
    context: int = 512,
    repeats: int = 5,
) -> dict[int, float]:
    """Seconds of a pass over so many nodes, the least of some repeats, after a context.

    Args:
        transformer: the target's, ``SpeculativeDecoder.target``, or a draft's.
        sizes: numbers of nodes.
        context: committed rows of the cache.
        repeats: passes of each size, after one that warms up.
    """
    context = min(context, transformer.max_positions - max(sizes) - 1)
    cache = transformer.new_cache(1, context + max(sizes))
    prefix = torch.full((1,), context, device=transformer.device)
    costs = {}
    for size in sizes:
        star = DraftTree.kary((size - 1,)) if size > 1 else DraftTree.chain(0)
        run = tree_pass(transformer, cache, star.on(transformer.device).mask)
        token_ids = torch.zeros(1, size, dtype=torch.int64, device=transformer.device)
        seconds = []
        for _ in range(repeats + 1):
            _wait(transformer.device)
            start = time.perf_counter()
            run(token_ids, prefix)
            _wait(transformer.device)
            seconds.append(time.perf_counter() - start)
        costs[size] = min(seconds[1:])
    return costs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_gamma(acceptance: Sequence[float], cost_ratio: float, present: int | None = None) -> int:
    """The length of chain with the highest memory-bound speed-up, 1 to 16.

    Args:
        acceptance: probability that the i-th drafted token is accepted if those before it were; the last one
            goes on for all later positions.
        cost_ratio: c, cost of a draft pass over that of a target pass.
        present: the length in use, which is kept unless another promises 3 % more.

    Raises:
        ValueError: for no acceptance.
    """
    if not acceptance:
        raise ValueError("acceptance must have at least one position")
    speeds, tau, reached = {}, 1.0, 1.0
    for gamma in range(1, MAX_DEPTH + 1):
        reached *= acceptance[min(gamma, len(acceptance)) - 1]
        tau += reached
        speeds[gamma] = memory_bound_speedup(tau, cost_ratio, gamma)
    best = max(speeds, key=speeds.get)
    return present if present and speeds[best] < WORTH_A_CHANGE * speeds[present] else best


class GammaHistory:
    """What calls of ``generate(gamma="auto")`` saw of each pair of target and draft, and what follows for the next.

    Models are not kept alive.
    """

    def __init__(self):
        self._pairs: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()

    def gamma(self, target: nn.Module, draft: object) -> int:
        """The length of the next chain; 5 for a pair that is new."""
        seen = self._pairs.get(target, {}).get(id(draft))
        return DEFAULT_GAMMA if seen is None else seen.get("gamma", DEFAULT_GAMMA)

    def add(self, target: nn.Module, draft: object, record: SpeculationRecord) -> None:
        """Counts a generation with a chain."""
        pairs = self._pairs.setdefault(target, {})
        if id(draft) not in pairs:
            pairs[id(draft)] = {"tried": [0] * MAX_NODES, "accepted": [0] * MAX_NODES}
            if not isinstance(draft, str):
                weakref.finalize(draft, pairs.pop, id(draft), None)
        seen = pairs[id(draft)]
        length = record.draft_passes
        for histogram in record.accepted:
            for count, cycles in enumerate(histogram):
                for position in range(min(count + 1, length)):
                    seen["tried"][position] += cycles
                    seen["accepted"][position] += cycles * (position < count)
        rates = [
            (accepted + _PRIOR_RATE * _PRIOR_TRIALS) / (tried + _PRIOR_TRIALS)
            for tried, accepted in zip(seen["tried"], seen["accepted"], strict=True)
            if tried
        ]
        if rates:
            seen["gamma"] = choose_gamma(rates, record.cost_ratio, length)
