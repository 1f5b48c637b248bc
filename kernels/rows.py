"""Rows of logits in Triton: penalties, statistics, and the threshold that top-k, top-p and min-p become."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAX_EOS = tl.constexpr(16)
NODE_FIELDS = tl.constexpr(8)
FIXED_POINT = tl.constexpr(1099511627776.0)  # 2**40: masses are summed as integers, in any order


@triton.jit
def penalised(x, penalty):
    """Logits of seen tokens: ``x * penalty`` below zero, ``x / penalty`` from there on, both to the nearest float32.

    Far from underflow, that is, and a ``penalty`` whose mantissa is all ones may be one bit off: the reciprocal and the
    quotient by it are each corrected once (Markstein).
    """
    inverse = 1.0 / penalty
    inverse = tl.fma(tl.fma(-inverse, penalty, 1.0), inverse, inverse)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, penalty, x), inverse, quotient)
    return tl.where(x < 0, x * penalty, quotient)


@triton.jit
def load_row(row, tokens, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos):
    """Logits of ``tokens`` as float32, with the penalties of the node's prefix; -inf beyond the row.

    Args:
        row: pointer to the row's logits, any floating type.
        tokens: block of token ids.
        row_vocab: number of logits in the row.
        penalty: repetition penalty, 1 for none.
        too_short: whether no end of sequence may come here.
        node: tree node of the row.
        tree_tokens: pointer to the tree's tokens, int64.
        table: pointer to the tree's table (``TreeNode`` in csrc/params.h).
        seen: pointer to the sequence's seen tokens, uint8.
        eos: pointer to 16 end-of-sequence ids, padded with -1.
    """
    inside = tokens < row_vocab
    x = tl.load(row + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    if penalty != 1.0:
        found = tl.load(seen + tokens, mask=inside, other=0) != 0
        place = node
        while place > 0:
            found = found | (tokens == tl.load(tree_tokens + place))
            place = tl.load(table + place * NODE_FIELDS)
        x = tl.where(found & inside, penalised(x, penalty), x)
    if too_short:
        for i in range(MAX_EOS):
            x = tl.where(tokens == tl.load(eos + i), float("-inf"), x)
    return x


@triton.jit
def ordered_key(x):
    """Non-negative int64 in the order of the floats; both zeros have one."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 2147483648, 4294967295 - bits, bits + 2147483648)


@triton.jit
def from_ordered_key(key):
    """The float of an ordered key."""
    bits = tl.where(key >= 2147483648, key - 2147483648, 4294967295 - key)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, maximum, scale, threshold, min_weight):
    """2 ** ((x - maximum) * scale) where the token is kept, else 0."""
    weight = tl.exp2((x - maximum) * scale)
    return tl.where((x >= threshold) & (weight >= min_weight), weight, 0.0)


@triton.jit
def mass_from(
    key,
    maximum,
    scale,
    row,
    row_vocab,
    penalty,
    too_short,
    node,
    tree_tokens,
    table,
    seen,
    eos,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fixed-point mass of the logits whose key is at least ``key``, or their number."""
    total = (key * 0).to(tl.int64)
    for start in range(0, row_vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = load_row(row, tokens, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos)
        if COUNT:
            share = tl.full([BLOCK], 1, tl.int64)
        else:
            share = (tl.exp2((x - maximum) * scale).to(tl.float64) * FIXED_POINT).to(tl.int64)
        total += tl.sum(tl.where((ordered_key(x) >= key) & (tokens < row_vocab), share, 0))
    return total


@triton.jit
def row_statistics(
    row,
    row_vocab,
    scale,
    greedy,
    top_k,
    top_p,
    min_p,
    penalty,
    too_short,
    node,
    tree_tokens,
    table,
    seen,
    eos,
    BLOCK: tl.constexpr,
):
    """(maximum, argmax, threshold, total, valid) of a row; a token is kept from the threshold and min_p on."""
    maximum = tl.full([], float("-inf"), tl.float32)
    argmax = row_vocab
    bad = 0
    for start in range(0, row_vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = load_row(row, tokens, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos)
        bad = bad | tl.max(tl.where(x < float("inf"), 0, 1))
        top = tl.max(tl.where(x < float("inf"), x, float("-inf")))
        first = tl.min(tl.where(x == top, tokens, row_vocab))
        argmax = tl.where(top > maximum, first, argmax)
        maximum = tl.maximum(maximum, top)
    valid = (bad == 0) & (maximum > float("-inf"))
    threshold = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 1.0, tl.float64)
    if valid & (greedy == 0):
        highest = ordered_key(maximum)
        kept = highest * 0 + 8388608  # the key of the lowest finite float
        if top_k > 0:
            # The largest value that at least k logits reach.
            low, high = kept, highest + 1
            while high - low > 1:
                middle = low + (high - low) // 2
                count = mass_from(
                    middle, maximum, scale, row, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos,
                    True, BLOCK,
                )  # fmt: skip
                enough = count >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            kept = low
        if top_p < 1.0:
            # The smallest value whose strictly larger ones weigh less than top_p.
            wanted = top_p * mass_from(
                kept, maximum, scale, row, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos,
                False, BLOCK,
            ).to(tl.float64)  # fmt: skip
            low, high = kept - 1, highest
            while high - low > 1:
                middle = low + (high - low) // 2
                mass = mass_from(
                    middle + 1, maximum, scale, row, row_vocab, penalty, too_short, node, tree_tokens, table, seen,
                    eos, False, BLOCK,
                )  # fmt: skip
                light = mass.to(tl.float64) < wanted
                high = tl.where(light, middle, high)
                low = tl.where(light, low, middle)
            kept = high
        threshold = from_ordered_key(kept)
        total = total * 0.0
        for start in range(0, row_vocab, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = load_row(row, tokens, row_vocab, penalty, too_short, node, tree_tokens, table, seen, eos)
            total += tl.sum(weight_of(x, maximum, scale, threshold, min_p)).to(tl.float64)
    return maximum, argmax, threshold, total, valid
