// Counter-based random numbers, bit for bit those of fastspec/philox.py.
#pragma once

#include <cstdint>

#include "ptx.cuh"

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

// The high or the low words of the 64-bit numbers of a quad of lanes.
enum class Half : uint32_t { kHigh = 0, kLow = 1 };

// A round of Philox4x32 (Salmon et al., SC 2011), and what becomes of its key.
struct PhiloxKey {
  uint32_t first, second;

  __device__ __forceinline__ uint4 round(const uint4& c) const {
    const uint64_t product0 = static_cast<uint64_t>(c.x) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c.z) * 0xCD9E8D57u;
    return {static_cast<uint32_t>(product1 >> 32) ^ c.y ^ first, static_cast<uint32_t>(product1),
            static_cast<uint32_t>(product0 >> 32) ^ c.w ^ second, static_cast<uint32_t>(product0)};
  }
  __device__ __forceinline__ void advance() { first += 0x9E3779B9u, second += 0xBB67AE85u; }
};
constexpr int kRounds = 10;

__device__ __forceinline__ uint4 philox_counter(const NoiseKey& key, uint32_t quad, Half half) {
  return {quad, key.source, key.position, static_cast<uint32_t>(half)};
}

__device__ __forceinline__ uint4 philox_block(const NoiseKey& key, uint32_t quad, Half half) {
  uint4 words = philox_counter(key, quad, half);
  PhiloxKey rounds = {key.key0, key.key1};
#pragma unroll
  for (int i = 0; i < kRounds; ++i, rounds.advance()) words = rounds.round(words);
  return words;
}

// Both halves, side by side; in a loop, as short code is a little faster where it runs once.
struct PhiloxWords {
  uint4 high, low;
};
__device__ __forceinline__ PhiloxWords philox_both(const NoiseKey& key, uint32_t quad) {
  PhiloxWords words = {philox_counter(key, quad, Half::kHigh), philox_counter(key, quad, Half::kLow)};
  PhiloxKey rounds = {key.key0, key.key1};
#pragma unroll 2
  for (int i = 0; i < kRounds; ++i, rounds.advance()) {
    words = {rounds.round(words.high), rounds.round(words.low)};
  }
  return words;
}

// The same as a call, for words that are seldom needed: instructions must be fetched, too.
static __device__ __noinline__ uint4 philox_call(NoiseKey key, uint32_t quad, Half half) {
  return philox_block(key, quad, half);
}

// Uniform in (0, 1] for tests of the form u <= h: 53 bits, rounded once to single precision, in which small ones
// keep all their digits.
__device__ __forceinline__ float accept_uniform(const NoiseKey& key) {
  const uint64_t high = philox_call(key, 0, Half::kHigh).x, low = philox_call(key, 0, Half::kLow).x;
  return __ull2float_rn((high << 21 | low >> 11) + 1) * 0x1p-53f;
}

// -log1p(-t) for t in (0, 1], to a few units in the last place of single precision. Both ways are computed and one
// is taken: a branch would cost more.
__device__ __forceinline__ float exponential_of(float t) {
  float series = 0.3339090645313263f;
  series = fmaf(series, t, 0.08952038735151291f);
  series = fmaf(series, t, 0.21425245702266693f);
  series = fmaf(series, t, 0.2486901879310608f);
  series = fmaf(series, t, 0.3333897590637207f);
  series = fmaf(series, t, 0.49999910593032837f);
  series = fmaf(series, t, 1.0f);
  const float logarithm = log2_fast(fmaxf(1.0f - t, 0x1p-33f));  // 1 - t may round to zero
  return t < 0.25f ? series * t : -0.6931471805599453f * logarithm;
}

// t = (k + 1/2) / 2**53, rounded, from the high word of k as a share of one and the low word, of which 21 bits count.
constexpr float kSmall = 0x1p-8f;  // from here on they are below half a unit in the last place
__device__ __forceinline__ float refine(float coarse, uint32_t lower) {
  return coarse < kSmall ? (fmaf(coarse, 0x1p53f, __uint2float_rn(lower >> 11)) + 0.5f) * 0x1p-53f : coarse;
}

// Unit exponentials -log1p(-t), t = (k + 1/2) / 2**53, of a quad of lanes, with full relative accuracy: the smallest
// ones decide whether an improbable token is ever drawn, so their low bits count. Where all wait for the slowest warp,
// and one in two and a half has a small one, the low words had better be computed always.
template <bool kAlways = false>
__device__ __forceinline__ float4 exponentials(const NoiseKey& key, uint32_t quad) {
  PhiloxWords words;
  if constexpr (kAlways) {
    words = philox_both(key, quad);
  } else {
    words.high = philox_block(key, quad, Half::kHigh);
  }
  const uint4& high = words.high;
  float4 t = {__uint2float_rn(high.x) * 0x1p-32f, __uint2float_rn(high.y) * 0x1p-32f,
              __uint2float_rn(high.z) * 0x1p-32f, __uint2float_rn(high.w) * 0x1p-32f};
  if (kAlways || fminf(fminf(t.x, t.y), fminf(t.z, t.w)) < kSmall) {
    if constexpr (!kAlways) words.low = philox_call(key, quad, Half::kLow);
    const uint4& low = words.low;
    t = {refine(t.x, low.x), refine(t.y, low.y), refine(t.z, low.z), refine(t.w, low.w)};
  }
  return {exponential_of(t.x), exponential_of(t.y), exponential_of(t.z), exponential_of(t.w)};
}

// Those of a quad, bit for bit, by two neighbouring lanes: each makes the words of one half for both, and gets two
// exponentials, the lane with the even index the first two.
__device__ __forceinline__ float2 exponentials_of_pair(const NoiseKey& key, uint32_t quad) {
  const bool odd = threadIdx.x % 2 != 0;
  const uint4 words = philox_block(key, quad, odd ? Half::kLow : Half::kHigh);
  const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? words.x : words.z, 1);
  const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? words.y : words.w, 1);
  const auto of = [](uint32_t high, uint32_t low) {
    return exponential_of(refine(__uint2float_rn(high) * 0x1p-32f, low));
  };
  if (odd) return {of(first, words.z), of(second, words.w)};
  return {of(words.x, first), of(words.y, second)};
}

// That of one lane, bit for bit.
__device__ __forceinline__ float exponential(const NoiseKey& key, uint32_t lane) {
  const PhiloxWords both = philox_both(key, lane / 4);
  const auto word = [&](const uint4& words) {
    return lane & 2 ? (lane & 1 ? words.w : words.z) : (lane & 1 ? words.y : words.x);
  };
  return exponential_of(refine(__uint2float_rn(word(both.high)) * 0x1p-32f, word(both.low)));
}

}  // namespace fastspec
