"""Verification in one Triton launch: a program per row of logits; the last to finish a sequence walks its tree."""

import triton
import triton.language as tl

from fastspec.kernels.philox import accept_uniforms, exponentials, noise_key
from fastspec.kernels.rows import LOG2E, MAX_EOS, NODE_FIELDS, load_row, penalised, row_statistics, weight_of

# The values of csrc/params.h.
TOKEN_LEVEL, BLOCK_RULE, RECURSIVE_REJECTION, TARGET_ONLY, DRAFTER_INVARIANT = map(tl.constexpr, range(5))
# The pairs of size and warps that compile without spills for every rule and tree.
BLOCK_SIZE, NUM_WARPS = 2048, {0: 8, 1: 8, 2: 8, 3: 4, 4: 8}
NODE_SIZES = (16, 128)
STATS_FIELDS = tl.constexpr(8)  # maximum, threshold, min_weight, total, argmax, valid
# Masses below this are what rounding leaves of a residual: the law before it stays.
ROUNDING = tl.constexpr(1e-6)
EMIT, TARGET, COUPLED = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


@triton.jit
def pick(vector, index, indices):
    """Element ``index`` of a vector in registers."""
    return tl.sum(tl.where(indices == index, vector, 0))


@triton.jit
def pass_over_row(
    a,
    c,
    node,
    removed,
    removed_scale,
    nodes,
    node_tokens,
    first_child,
    num_children,
    key0,
    key1,
    source,
    position,
    stats,
    draft_stats,
    row,
    draft_row,
    vocab_size,
    scale,
    penalty,
    too_short,
    tree_tokens,
    table,
    seen,
    eos,
    RACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mass of w = [a p - c q]+ over a row, of q over the tokens not removed, and in a race a draw: (mass, left, token).

    Tokens of removed children keep the c they had.
    """
    maximum = tl.load(stats, cache_modifier=".cg").to(tl.float32)
    threshold = tl.load(stats + 1, cache_modifier=".cg").to(tl.float32)
    min_weight = tl.load(stats + 2, cache_modifier=".cg").to(tl.float32)
    p_scale = a / tl.load(stats + 3, cache_modifier=".cg")
    subtract = c > 0.0
    mass = a * 0.0
    left = a * 0.0
    best_score = a * 0.0 - 1.0
    best_token = vocab_size
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = load_row(row, tokens, vocab_size, penalty, too_short, node, tree_tokens, table, seen, eos)
        weights = weight_of(x, maximum, scale, threshold, min_weight).to(tl.float64) * p_scale
        if subtract:
            taken = tl.zeros([BLOCK], tl.float64) + c
            kept = tl.zeros([BLOCK], tl.float64) + 1.0
            for child in range(first_child, first_child + num_children):
                gone = pick(removed, child, nodes) != 0
                same = tokens == pick(node_tokens, child, nodes)
                taken = tl.where(gone & same, pick(removed_scale, child, nodes), taken)
                kept = tl.where(gone & same, 0.0, kept)
            draft_maximum = tl.load(draft_stats, cache_modifier=".cg").to(tl.float32)
            draft_total = tl.load(draft_stats + 3, cache_modifier=".cg")
            y = tl.load(draft_row + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
            q = tl.exp2((y - draft_maximum) * LOG2E).to(tl.float64) / draft_total
            weights = tl.maximum(weights - taken * q, 0.0)
            left += tl.sum(kept * q)
        mass += tl.sum(weights)
        if RACE:
            scores = tl.where(
                weights > 0, weights / exponentials(start, key0, key1, source, position, BLOCK), -1.0
            )
            top = tl.max(scores)
            first = tl.min(tl.where(scores == top, tokens, vocab_size))
            best_token = tl.where(top > best_score, first, best_token)
            best_score = tl.maximum(best_score, top)
    return mass, left, best_token


# Sizes change from tree to tree; a kernel compiled for each would be a pause at each.
@triton.jit(
    do_not_specialize=[
        "target_stride",
        "tokens_stride",
        "num_rows",
        "vocab_size",
        "num_nodes",
        "num_inner",
        "max_depth",
    ]
)
def verify_kernel(
    target_logits,
    draft_logits,
    tokens,
    table,
    positions,
    temperature,
    top_k,
    top_p,
    min_p,
    repetition_penalty,
    min_tokens,
    seed,
    eos_token_ids,
    seen,
    stats,
    arrivals,
    path,
    num_accepted,
    next_token,
    invalid,
    target_stride,
    tokens_stride,
    num_rows,
    vocab_size,
    num_nodes,
    num_inner,
    max_depth,
    RULE: tl.constexpr,
    NEEDS_DRAFT: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See fastspec.ops.verify; NODES is a power of two, at least num_nodes."""
    sequence = tl.program_id(0) // num_rows
    row_index = tl.program_id(0) % num_rows
    wide = sequence.to(tl.int64)
    tokens += wide * tokens_stride
    seen += wide * vocab_size
    eos = eos_token_ids + wide * MAX_EOS
    target_logits += wide * num_nodes * target_stride
    draft_logits += wide * num_inner * vocab_size
    stats += wide * (num_nodes + num_inner) * STATS_FIELDS
    position = tl.load(positions + sequence)
    key = tl.load(seed + sequence)
    heat = tl.load(temperature + sequence).to(tl.float32)
    greedy = tl.where(heat > 0, 0, 1)
    scale = tl.minimum((heat * 0.0 + LOG2E) / tl.where(heat > 0, heat, 1.0), 1e30)
    least = tl.load(min_p + sequence).to(tl.float32)
    penalty = tl.load(repetition_penalty + sequence).to(tl.float32)
    shortest = tl.load(min_tokens + sequence)
    most = tl.load(top_k + sequence)
    most = tl.where(most < vocab_size, most, 0)

    # 1. Statistics of this program's row.
    if row_index < num_nodes:
        node = row_index
        too_short = position + tl.load(table + node * NODE_FIELDS + 1) < shortest
        maximum, argmax, threshold, total, valid = row_statistics(
            target_logits + node.to(tl.int64) * target_stride, vocab_size, scale, greedy, most,
            tl.load(top_p + sequence), least, penalty, too_short, node, tokens, table, seen, eos, BLOCK,
        )  # fmt: skip
    else:
        # Draft rows are log-weights of q as they are.
        maximum, argmax, threshold, total, valid = row_statistics(
            draft_logits + (row_index - num_nodes).to(tl.int64) * vocab_size, vocab_size, scale * 0.0 + LOG2E,
            greedy * 0, most * 0, tl.full([], 1.0, tl.float64), least * 0.0, penalty * 0.0 + 1.0, greedy > 1,
            row_index, tokens, table, seen, eos, BLOCK,
        )  # fmt: skip
    mine = stats + row_index * STATS_FIELDS
    tl.store(mine, maximum.to(tl.float64))
    tl.store(mine + 1, threshold.to(tl.float64))
    tl.store(mine + 2, tl.where(row_index < num_nodes, least, 0.0).to(tl.float64))
    tl.store(mine + 3, total)
    tl.store(mine + 4, argmax.to(tl.float64))
    tl.store(mine + 5, valid.to(tl.float64))
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + sequence, 1, sem="acq_rel")
    if arrived == num_rows - 1:
        tl.store(arrivals + sequence, 0)  # for the next launch

        # 2. The walk, by the last program of the sequence.
        nodes = tl.arange(0, NODES)
        exists = nodes < num_nodes
        node_tokens = tl.load(tokens + nodes, mask=exists, other=-1).to(tl.int32)
        parents = tl.load(table + nodes * NODE_FIELDS, mask=exists & (nodes > 0), other=0)
        valid_rows = tl.load(stats + nodes * STATS_FIELDS + 5, mask=exists, other=0.0, cache_modifier=".cg")
        none = tl.zeros([NODES], tl.float64)
        no_removed = tl.zeros([NODES], tl.int32)
        stop = row_index * 0
        next_id = row_index * 0 - 1
        if (greedy != 0) or (not NEEDS_DRAFT):
            going = row_index * 0 + 1
            node = row_index * 0
            while going != 0:
                stop = node
                next_id = next_id * 0 - 1
                if pick(valid_rows, node, nodes) == 0:
                    going = going * 0
                else:
                    depth = tl.load(table + node * NODE_FIELDS + 1)
                    if greedy != 0:
                        next_id = tl.load(stats + node * STATS_FIELDS + 4, cache_modifier=".cg").to(tl.int32)
                    else:
                        if RULE == DRAFTER_INVARIANT:
                            key0, key1, source, place = noise_key(key, position + depth, COUPLED, node * 0)
                        else:
                            key0, key1, source, place = noise_key(key, position, TARGET, node)
                        one = tl.full([], 1.0, tl.float64)
                        _, _, next_id = pass_over_row(
                            one, one * 0.0, node, no_removed, none, nodes, node_tokens, node, node * 0, key0, key1,
                            source, place, stats + node * STATS_FIELDS, stats,
                            target_logits + node.to(tl.int64) * target_stride, draft_logits, vocab_size, scale,
                            penalty, position + depth < shortest, tokens, table, seen, eos, True, BLOCK,
                        )  # fmt: skip
                    first = tl.load(table + node * NODE_FIELDS + 2)
                    count = tl.load(table + node * NODE_FIELDS + 3)
                    hit = (nodes >= first) & (nodes < first + count) & (node_tokens == next_id)
                    child = tl.min(tl.where(hit, nodes, NODES))
                    going = tl.where(child < NODES, 1, 0)
                    node = tl.where(child < NODES, child, node)
        else:
            # What each node's test needs: p and q of its token at its parent, and its uniform.
            inner_rows = tl.load(table + parents * NODE_FIELDS + 4, mask=exists & (nodes > 0), other=0)
            safe = tl.where((node_tokens >= 0) & (node_tokens < vocab_size), node_tokens, 0)
            has_token = exists & (nodes > 0) & (node_tokens >= 0) & (node_tokens < vocab_size)
            x = tl.load(
                target_logits + parents.to(tl.int64) * target_stride + safe, mask=has_token, other=0.0
            )
            x = x.to(tl.float32)
            depths = tl.load(table + parents * NODE_FIELDS + 1, mask=exists, other=0)
            if penalty != 1.0:
                found = tl.load(seen + safe, mask=has_token, other=0) != 0
                above = parents
                for _ in range(max_depth):
                    found = found | ((above > 0) & (tl.load(tokens + above) == safe))
                    above = tl.load(table + above * NODE_FIELDS, mask=above > 0, other=0)
                x = tl.where(found, penalised(x, penalty), x)
            ends = x < float("-inf")
            for i in range(MAX_EOS):
                ends = ends | (safe == tl.load(eos + i))
            x = tl.where(ends & (position + depths < shortest), float("-inf"), x)
            above_stats = stats + parents * STATS_FIELDS
            draft_stats = stats + (num_nodes + inner_rows) * STATS_FIELDS
            maxima = tl.load(above_stats, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
            thresholds = tl.load(above_stats + 1, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
            totals = tl.load(above_stats + 3, mask=exists, other=1.0, cache_modifier=".cg")
            above_valid = tl.load(above_stats + 5, mask=exists, other=0.0, cache_modifier=".cg")
            p = weight_of(x, maxima, scale, thresholds, least).to(tl.float64) / totals
            y = tl.load(draft_logits + inner_rows.to(tl.int64) * vocab_size + safe, mask=has_token, other=0.0)
            draft_maxima = tl.load(draft_stats, mask=exists, other=0.0, cache_modifier=".cg").to(tl.float32)
            draft_totals = tl.load(draft_stats + 3, mask=exists, other=1.0, cache_modifier=".cg")
            draft_valid = tl.load(draft_stats + 5, mask=exists, other=0.0, cache_modifier=".cg")
            q = tl.exp2((y.to(tl.float32) - draft_maxima) * LOG2E).to(tl.float64) / draft_totals
            present = has_token & (above_valid != 0) & (draft_valid != 0)
            p = tl.where(present, p, 0.0)
            q = tl.where(present, q, 0.0)
            present_flags = present.to(tl.int32)
            uniforms = accept_uniforms(key, position, nodes)

            a = tl.full([], 1.0, tl.float64)
            c = a * 0.0
            previous = a * 0.0
            removed = no_removed
            removed_scale = none
            known = row_index * 0  # whether next_id has been drawn already
            if RULE == BLOCK_RULE:
                weights = tl.where(nodes == 0, 1.0, 0.0).to(tl.float64)
                last = row_index * 0
                going = row_index * 0 + 1
                while going != 0:
                    going = going * 0
                    if pick(present_flags, last + 1, nodes) != 0:
                        carried = pick(weights, last, nodes) * pick(p, last + 1, nodes)
                        chance = pick(q, last + 1, nodes)
                        ratio = carried / tl.where(chance > 0, chance, 1.0)
                        r = tl.where(chance > 0, ratio, tl.where(carried > 0, 1.0, 0.0))
                        r = tl.minimum(r, 1.0)
                        weights = tl.where(nodes == last + 1, r, weights)
                        last += 1
                        going = going + 1
                stop = last
                going = tl.where(
                    (last > 0) & (pick(uniforms, last, nodes) > pick(weights, last, nodes)), 1, 0
                )
                while going != 0:
                    # h <= r, so most tests fail without their sum over the vocabulary.
                    stop -= 1
                    a = pick(weights, stop, nodes)
                    c = a * 0.0 + 1.0
                    if stop == 0:
                        going = going * 0
                    elif pick(uniforms, stop, nodes) <= a:
                        key0, key1, source, place = noise_key(key, position, EMIT, stop)
                        inner = tl.load(table + stop * NODE_FIELDS + 4)
                        mass, _, drawn = pass_over_row(
                            a, c, stop, removed, removed_scale, nodes, node_tokens, stop, stop * 0, key0, key1, source,
                            place, stats + stop * STATS_FIELDS, stats + (num_nodes + inner) * STATS_FIELDS,
                            target_logits + stop.to(tl.int64) * target_stride,
                            draft_logits + inner.to(tl.int64) * vocab_size, vocab_size, scale, penalty,
                            position + stop < shortest, tokens, table, seen, eos, True, BLOCK,
                        )  # fmt: skip
                        below = mass + 1.0 - a
                        h = tl.where(below > 0, mass / tl.where(below > 0, below, 1.0), 1.0)
                        if pick(uniforms, stop, nodes) <= h:
                            going = going * 0
                            known = tl.where(mass > ROUNDING, 1, 0)
                            next_id = drawn
            else:
                node = row_index * 0
                going = row_index * 0 + 1
                while going != 0:
                    stop = node
                    first = tl.load(table + node * NODE_FIELDS + 2)
                    count = tl.load(table + node * NODE_FIELDS + 3)
                    siblings = (nodes >= first) & (nodes < first + count) & present
                    last = tl.max(tl.where(siblings, nodes, -1))
                    mass = tl.full([], 1.0, tl.float64)
                    left = mass
                    c = mass * 0.0
                    previous = c
                    removed = no_removed
                    removed_scale = none
                    accepted = row_index * 0 - 1
                    child = first
                    while (child <= last) & (accepted < 0):
                        if pick(present_flags, child, nodes) != 0:
                            token = pick(node_tokens, child, nodes)
                            twin = (removed != 0) & (node_tokens == token)
                            is_twin = tl.max(twin.to(tl.int32)) != 0
                            taken = tl.where(is_twin, tl.max(tl.where(twin, removed_scale, 0.0)), c)
                            q_here = tl.where(is_twin, 0.0, pick(q, child, nodes))
                            p_here = (
                                tl.maximum(pick(p, child, nodes) - taken * pick(q, child, nodes), 0.0) / mass
                            )
                            weighable = (q_here > 0) & (left > 0)
                            ratio = tl.where(
                                weighable,
                                p_here * left / tl.where(weighable, q_here, 1.0),
                                tl.where(p_here > 0, 1.0, 0.0),
                            )
                            if pick(uniforms, child, nodes) <= tl.minimum(ratio, 1.0):
                                accepted = child
                            else:
                                previous = c
                                c = tl.where(left > 0, c + mass / tl.where(left > 0, left, 1.0), c)
                                removed = tl.where(nodes == child, 1, removed)
                                removed_scale = tl.where(
                                    nodes == child, tl.where(is_twin, taken, c), removed_scale
                                )
                                if (child < last) & (c > previous):
                                    # Only a later test needs the masses. What is left of q is summed anew: 1 - q
                                    # has no digits where a draft was sure of what it drew first.
                                    inner = tl.load(table + node * NODE_FIELDS + 4)
                                    depth = tl.load(table + node * NODE_FIELDS + 1)
                                    rest, left, _ = pass_over_row(
                                        a, c, node, removed, removed_scale, nodes, node_tokens, first, count,
                                        child.to(tl.uint32), child.to(tl.uint32), child.to(tl.uint32),
                                        child.to(tl.uint32), stats + node * STATS_FIELDS,
                                        stats + (num_nodes + inner) * STATS_FIELDS,
                                        target_logits + node.to(tl.int64) * target_stride,
                                        draft_logits + inner.to(tl.int64) * vocab_size, vocab_size, scale, penalty,
                                        position + depth < shortest, tokens, table, seen, eos, False, BLOCK,
                                    )  # fmt: skip
                                    # Where nothing but rounding is left, the law stays.
                                    removed_scale = tl.where(
                                        (nodes == child) & (none + rest <= ROUNDING),
                                        tl.minimum(removed_scale, previous),
                                        removed_scale,
                                    )
                                    c = tl.where(rest > ROUNDING, c, previous)
                                    mass = tl.where(rest > ROUNDING, rest, mass)
                        child += 1
                    going = tl.where(accepted >= 0, 1, 0)
                    node = tl.where(accepted >= 0, accepted, node)

            # The token after the path: from the residual, or from what it was before rounding emptied it.
            attempt = row_index * 0
            while (known == 0) & (pick(valid_rows, stop, nodes) != 0):
                key0, key1, source, place = noise_key(key, position, EMIT, stop)
                inner = tl.maximum(tl.load(table + stop * NODE_FIELDS + 4), 0)
                depth = tl.load(table + stop * NODE_FIELDS + 1)
                first = tl.load(table + stop * NODE_FIELDS + 2)
                count = tl.load(table + stop * NODE_FIELDS + 3)
                rest, _, next_id = pass_over_row(
                    a, c, stop, removed, removed_scale, nodes, node_tokens, first, count, key0, key1, source, place,
                    stats + stop * STATS_FIELDS, stats + (num_nodes + inner) * STATS_FIELDS,
                    target_logits + stop.to(tl.int64) * target_stride, draft_logits + inner.to(tl.int64) * vocab_size,
                    vocab_size, scale, penalty, position + depth < shortest, tokens, table, seen, eos, True, BLOCK,
                )  # fmt: skip
                known = tl.where((rest > ROUNDING) | (attempt > 0), 1, 0)
                a = a * 0.0 + 1.0
                c = previous
                removed_scale = tl.minimum(removed_scale, previous)
                attempt += 1

        # 3. Output.
        is_invalid = pick(valid_rows, stop, nodes) == 0
        depth = tl.load(table + stop * NODE_FIELDS + 1)
        path += wide * (max_depth + 1)
        place = stop
        for i in range(max_depth + 1):
            step = max_depth - i
            tl.store(path + step, tl.where(step > depth, stop, place).to(tl.int64))
            up = tl.load(table + place * NODE_FIELDS)
            place = tl.where((step <= depth) & (place > 0), up, place)
        tl.store(num_accepted + sequence, depth.to(tl.int64))
        tl.store(next_token + sequence, tl.where(is_invalid, -1, next_id).to(tl.int64))
        tl.store(invalid + sequence, is_invalid)
