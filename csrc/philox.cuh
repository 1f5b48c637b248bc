// Counter-based random numbers, bit for bit those of fastspec/philox.py.
#pragma once

#include <cstdint>

namespace fastspec {

// Disjoint sources of randomness within a cycle; the values of fastspec.philox.Stream.
enum class Stream : uint32_t { kDraft = 0, kAccept = 1, kEmit = 2, kTarget = 3, kCoupled = 4 };

// What identifies a family of draws; the lane picks one of it.
struct NoiseKey {
  uint32_t key0, key1;  // the sequence's seed
  uint32_t source;      // stream and node
  uint32_t position;
};

__device__ __forceinline__ NoiseKey noise_key(int64_t seed, int64_t position, Stream stream, int node) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
          (static_cast<uint32_t>(stream) << 16) + static_cast<uint32_t>(node), static_cast<uint32_t>(position)};
}

// Philox4x32-10 (Salmon et al., SC 2011): the block of a pair of lanes.
__device__ __forceinline__ uint4 philox_block(const NoiseKey& key, uint32_t pair) {
  uint32_t c0 = pair, c1 = key.source, c2 = key.position, c3 = 0;
  uint32_t k0 = key.key0, k1 = key.key1;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// Uniform in (0, 1] with 53 bits, for tests of the form u <= h.
__device__ __forceinline__ double accept_uniform(const NoiseKey& key) {
  const uint4 words = philox_block(key, 0);
  const uint64_t bits = (static_cast<uint64_t>(words.x) << 21) | (words.y >> 11);
  return static_cast<double>(bits + 1) * 0x1p-53;
}

// Unit exponential -log1p(-t), t = (k + 1/2) / 2**53, in single precision with full relative accuracy: the
// smallest ones decide whether an improbable token is ever drawn, so their low bits count.
__device__ __forceinline__ float exponential(uint32_t high, uint32_t low) {
  float t;
  if (high >= (1u << 24)) {
    t = __uint2float_rn(high) * 0x1p-32f;  // the low word is below half an ulp
  } else {
    const uint64_t bits = (static_cast<uint64_t>(high) << 21) | (low >> 11);
    t = (__ull2float_rn(bits) + 0.5f) * 0x1p-53f;
  }
  return -log1pf(-t);
}

}  // namespace fastspec
