"""Counter-based random numbers in Triton, bit for bit those of fastspec/philox.py."""

import triton
import triton.language as tl


@triton.jit
def philox_block(pair, source, position, key0, key1):
    """Philox4x32-10: four 32-bit words for a pair of lanes; all arguments uint32 and broadcastable."""
    c0 = pair
    c1 = source + pair * 0
    c2 = position + pair * 0
    c3 = pair * 0
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
    high, low, _, _ = philox_block(source * 0, source, place, key0, key1)
    return (_bits53(high, low) + 1).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def exponentials(tokens, key0, key1, source, position):
    """Unit exponentials for ``tokens``, float64: -log1p(-t) with full relative accuracy where t is small."""
    lane = tokens.to(tl.uint32)
    w0, w1, w2, w3 = philox_block(lane >> 1, source, position, key0, key1)
    odd = (lane & 1) == 1
    bits = _bits53(tl.where(odd, w2, w0), tl.where(odd, w3, w1))
    t = (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16
    series = t * (1.0 + t * (0.5 + t * (0.3333333333333333 + t * 0.25)))
    # The series is exact to float64 below 2**-10; above it 1 - t keeps enough bits.
    direct = -tl.log(tl.where(t < 0.0009765625, 0.5, tl.maximum(1.0 - t, 1.1e-16)))
    return tl.where(t < 0.0009765625, series, direct)
