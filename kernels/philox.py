"""Counter-based random numbers in Triton, bit for bit those of fastspec/philox.py."""

import triton
import triton.language as tl


@triton.jit
def philox_block(quad, source, position, half, key0, key1):
    """Philox4x32-10: the high (half 0) or low (half 1) words of a quad of lanes; all arguments uint32."""
    c0 = quad
    c1 = source + quad * 0
    c2 = position + quad * 0
    c3 = quad * 0 + half
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + 0x9E3779B9
        key1 = key1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _bits53(high, low):
    return (high.to(tl.uint64) << 21) | (low >> 11).to(tl.uint64)


@triton.jit
def noise_key(seed, position, stream: tl.constexpr, node):
    """What identifies a family of draws: (key0, key1, source, position), uint32 each."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    source = (node + stream * 65536).to(tl.uint32)
    return key0, key1, source, position.to(tl.uint32)


@triton.jit
def accept_uniforms(seed, position, nodes):
    """Uniforms in (0, 1] with 53 bits for the tests of ``nodes``, float64."""
    key0, key1, source, place = noise_key(seed, position, 1, nodes)
    high, _, _, _ = philox_block(source * 0, source, place, 0, key0, key1)
    low, _, _, _ = philox_block(source * 0, source, place, 1, key0, key1)
    return (_bits53(high, low) + 1).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def exponentials(start, key0, key1, source, position, BLOCK: tl.constexpr):
    """Unit exponentials for the BLOCK tokens from ``start`` (a multiple of 4) on, float64.

    -log1p(-t) with full relative accuracy where t is small.
    """
    quad = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    h0, h1, h2, h3 = philox_block(quad, source, position, 0, key0, key1)
    l0, l1, l2, l3 = philox_block(quad, source, position, 1, key0, key1)
    even = tl.interleave(_bits53(h0, l0), _bits53(h2, l2))
    odd = tl.interleave(_bits53(h1, l1), _bits53(h3, l3))
    t = (tl.interleave(even, odd).to(tl.float64) + 0.5) * 1.1102230246251565e-16
    series = t * (1.0 + t * (0.5 + t * (0.3333333333333333 + t * 0.25)))
    # The series is exact to float64 below 2**-10; above it 1 - t keeps enough bits.
    direct = -tl.log(tl.where(t < 0.0009765625, 0.5, tl.maximum(1.0 - t, 1.1e-16)))
    return tl.where(t < 0.0009765625, series, direct)
