"""What stands between the products of a prompt's layers, in Triton: one launch each, one program for part of a row."""

import triton
import triton.language as tl

#: Elements of a row that a program of the gate takes, and the most of a half head times heads that one of RoPE does.
GATE_BLOCK, ROTATION_BLOCK = 1024, 1024
NUM_WARPS = 4


def norm_warps(block):
    """Warps for a row of so many elements, a power of two: 16 elements for each thread, as far as that goes."""
    return min(16, max(1, block // 512))


def rotation_heads(pairs):
    """Heads that a program of RoPE takes, where a head has so many pairs."""
    return max(1, ROTATION_BLOCK // pairs)


@triton.jit
def add_norm_kernel(
    hidden,
    update,
    weight,
    normed,
    epsilon,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
):
    """See fastspec.ops.prefill.add_norm; the sum takes the place of the update."""
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    stream = tl.load(hidden + row + columns, mask=inside, other=0.0)
    kind = stream.dtype
    if HAS_UPDATE:
        change = tl.load(update + row + columns, mask=inside, other=0.0)
        stream = (stream.to(tl.float32) + change.to(tl.float32)).to(kind)
        tl.store(update + row + columns, stream, mask=inside)
    exact = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact) / SIZE + epsilon)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = ((exact * scale).to(kind).to(tl.float32) * factor).to(kind)
    tl.store(normed + row + columns, result, mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def rotate_kernel(
    fused,
    cos,
    sin,
    keys,
    values,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See fastspec.ops.prefill.rotate_prompt; queries are turned where they are."""
    TOTAL: tl.constexpr = HEADS + 2 * KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    there = pair < HALF
    place = fused + token * (TOTAL * HEAD_DIM) + head * HEAD_DIM + pair
    first = tl.load(place, mask=(head < TOTAL) & there, other=0.0)
    second = tl.load(place + HALF, mask=(head < TOTAL) & there, other=0.0)
    kind = first.dtype
    # As PyTorch rounds it: both products and their sum.
    c = tl.load(cos + token * HEAD_DIM + pair, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HEAD_DIM + pair, mask=there, other=0.0).to(tl.float32)
    x = first.to(tl.float32)
    y = second.to(tl.float32)
    turned_first = ((x * c).to(kind).to(tl.float32) + (-y * s).to(kind).to(tl.float32)).to(kind)
    turned_second = ((y * c).to(kind).to(tl.float32) + (x * s).to(kind).to(tl.float32)).to(kind)

    is_query = (head < HEADS) & there
    tl.store(place, turned_first, mask=is_query)
    tl.store(place + HALF, turned_second, mask=is_query)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS) & there
    row = keys + ((head - HEADS).to(tl.int64) * capacity + token) * HEAD_DIM + pair
    tl.store(row, turned_first, mask=is_key)
    tl.store(row + HALF, turned_second, mask=is_key)
    is_value = (head >= HEADS + KV_HEADS) & (head < TOTAL) & there
    row = values + ((head - HEADS - KV_HEADS).to(tl.int64) * capacity + token) * HEAD_DIM + pair
    tl.store(row, first, mask=is_value)
    tl.store(row + HALF, second, mask=is_value)


@triton.jit
def gate_kernel(gate_up, gated, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """See fastspec.ops.prefill.gate."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    opening = tl.load(gate_up + row * (2 * SIZE) + columns, mask=inside, other=0.0)
    kind = opening.dtype
    passing = tl.load(gate_up + row * (2 * SIZE) + SIZE + columns, mask=inside, other=0.0)
    x = opening.to(tl.float32)
    opened = (x / (1.0 + tl.exp(-x))).to(kind)
    result = (opened.to(tl.float32) * passing.to(tl.float32)).to(kind)
    tl.store(gated + row * SIZE + columns, result, mask=inside)
