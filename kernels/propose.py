"""The draft's own sampling in one Triton launch: a program per row writes q and draws the row's children."""

import triton
import triton.language as tl

from fastspec.kernels.philox import exponentials, noise_key
from fastspec.kernels.rows import LOG2E, MAX_EOS, NODE_FIELDS, load_row, row_statistics, weight_of
from fastspec.kernels.verify import COUPLED, DRAFTER_INVARIANT, TARGET_ONLY

BLOCK_SIZE, NUM_WARPS = 4096, 16
DRAFT = tl.constexpr(0)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=[
        "logits_stride",
        "tokens_stride",
        "num_rows",
        "num_inner",
        "first_inner",
        "level",
        "vocab_size",
        "row_vocab",
    ]
)
def propose_kernel(
    logits,
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
    logits_stride,
    tokens_stride,
    num_rows,
    num_inner,
    first_inner,
    level,
    vocab_size,
    row_vocab,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See fastspec.ops.propose; ``row_vocab`` is the number of logits the draft and the target share."""
    sequence = tl.program_id(0) // num_rows
    row_index = tl.program_id(0) % num_rows
    wide = sequence.to(tl.int64)
    tokens += wide * tokens_stride
    seen += wide * vocab_size
    eos = eos_token_ids + wide * MAX_EOS
    row = logits + (wide * num_rows + row_index) * logits_stride
    log_weights = draft_logits + (wide * num_inner + first_inner + row_index) * vocab_size
    node = tl.load(table + (first_inner + row_index) * NODE_FIELDS + 5)
    position = tl.load(positions + sequence)
    key = tl.load(seed + sequence)
    heat = tl.load(temperature + sequence).to(tl.float32)
    greedy = tl.where(heat > 0, 0, 1)
    scale = tl.minimum((heat * 0.0 + LOG2E) / tl.where(heat > 0, heat, 1.0), 1e30)
    least = tl.load(min_p + sequence).to(tl.float32)
    penalty = tl.load(repetition_penalty + sequence).to(tl.float32)
    too_short = position + level < tl.load(min_tokens + sequence)
    most = tl.load(top_k + sequence)
    most = tl.where(most < vocab_size, most, 0)
    maximum, _, threshold, _, valid = row_statistics(
        row, row_vocab, scale, greedy, most, tl.load(top_p + sequence), least, penalty, too_short, node, tokens,
        table, seen, eos, BLOCK,
    )  # fmt: skip
    # A row that is no law counts as uniform over the whole vocabulary.
    maximum = tl.where(valid, maximum, 0.0)
    threshold = tl.where(valid, threshold, float("-inf"))
    least = tl.where(valid, least, 0.0)
    if RULE == DRAFTER_INVARIANT:
        key0, key1, source, place = noise_key(key, position + level, COUPLED, node * 0)
    else:
        key0, key1, source, place = noise_key(key, position, DRAFT, node)
    noisy = (greedy == 0) & (RULE != TARGET_ONLY)

    first_child = tl.load(table + node * NODE_FIELDS + 2)
    count = tl.load(table + node * NODE_FIELDS + 3)
    last_score = tl.full([], float("inf"), tl.float64)
    last_token = node * 0 - 1
    for child in range(count):
        best_score = tl.full([], float("-inf"), tl.float64)
        best_token = vocab_size
        for start in range(0, vocab_size, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            x = load_row(row, ids, row_vocab, penalty, too_short, node, tokens, table, seen, eos)
            x = tl.where(valid, x, tl.where(ids < vocab_size, 0.0, float("-inf")))
            weights = weight_of(x, maximum, scale, threshold, least)
            if (child == 0) & (greedy == 0):
                log_weight = tl.where(weights > 0, (x - maximum) * scale * LN2, float("-inf"))
                tl.store(log_weights + ids, log_weight, mask=ids < vocab_size)
            if noisy:
                noise = exponentials(start, key0, key1, source, place, BLOCK)
                scores = tl.where(weights > 0, weights.to(tl.float64) / noise, float("-inf"))
            else:
                scores = x.to(tl.float64)
            drawn = (scores > last_score) | ((scores == last_score) & (ids <= last_token))
            scores = tl.where(drawn, float("-inf"), scores)
            top = tl.max(scores)
            first = tl.min(tl.where(scores == top, ids, vocab_size))
            best_token = tl.where(top > best_score, first, best_token)
            best_score = tl.maximum(best_score, top)
        if (child == 0) & (greedy != 0):
            for start in range(0, vocab_size, BLOCK):
                ids = start + tl.arange(0, BLOCK)
                one_hot = tl.where(ids == best_token, 0.0, float("-inf"))
                tl.store(log_weights + ids, one_hot, mask=ids < vocab_size)
        found = best_score > float("-inf")
        tl.store(tokens + first_child + child, tl.where(found, best_token, -1).to(tl.int64))
        last_score = best_score
        last_token = best_token
