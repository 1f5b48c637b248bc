// Rows of logits: reading them with penalties, statistics of tiles, and what makes a row of logits a law.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "params.h"
#include "ptx.cuh"
#include "reduce.cuh"

namespace fastspec {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kVectors = 4;  // a lane's share of a tile: of four tokens, kTile / 4 apart

// The sampling parameters of one sequence.
struct Law {
  float scale;  // log2(e) / temperature; the weight of a logit x is 2 ** ((x - max) * scale)
  bool greedy;
  int top_k;    // 0: all
  float min_p;  // 0: all
  double top_p;  // 1: all
  bool cuts;     // whether a row's threshold must be searched before its mass is known
};

// The law of log-weights as they are.
__device__ __forceinline__ Law plain_law() { return {kLog2e, false, 0, 0.0f, 1.0, false}; }

// The same as it is stored.
struct StoredLaw {
  double temperature, top_p, min_p;
  int64_t top_k;

  __device__ __forceinline__ StoredLaw(const SamplingParams& sampling, int sequence)
      : temperature(sampling.temperature[sequence]),
        top_p(sampling.top_p[sequence]),
        min_p(sampling.min_p[sequence]),
        top_k(sampling.top_k[sequence]) {}

  __device__ __forceinline__ Law law(int vocab_size) const {
    Law law = plain_law();
    law.greedy = !(static_cast<float>(temperature) > 0);
    if (!law.greedy) law.scale = fminf(kLog2e / static_cast<float>(temperature), 1e30f);
    law.top_k = top_k < vocab_size ? static_cast<int>(top_k) : 0;
    law.min_p = static_cast<float>(min_p);
    law.top_p = top_p;
    law.cuts = !law.greedy && (law.top_k > 0 || law.top_p < 1 || law.min_p > 0);
    return law;
  }
};

__device__ __forceinline__ Law load_law(const SamplingParams& sampling, int sequence, int vocab_size) {
  return StoredLaw(sampling, sequence).law(vocab_size);
}

// What a prefix does to the logits after it: repetition penalty, and ends that must not come yet. One per block, in
// shared memory.
struct Penalties {
  float repetition;     // 1: none
  int shortest;         // depth from which on the sequence may end
  const uint8_t* seen;  // [V], tokens before the tree
  const int64_t* eos;   // [kMaxEos], padded with -1
  int tokens[kMaxNodes];
  int parents[kMaxNodes];

  __device__ __forceinline__ bool touch(int depth) const { return repetition != 1.0f || depth < shortest; }
};

// Four logits from token `first` on, in the row of a node, after its prefix has changed them. A call of its own, as
// load_singly below: most rows need neither, and a launch of microseconds waits for every instruction it has to fetch.
static __device__ __noinline__ float4 penalise(float4 x, const Penalties& penalties, int first, int node, int depth,
                                               int vocab_size) {
  uint32_t repeated = 0, barred = 0;  // bit i: token first + i
  const auto mark = [&](uint32_t& mask, int token) {
    if (token >= first && token < first + 4) mask |= 1u << (token - first);
  };
  if (penalties.repetition != 1.0f) {
    for (int i = 0; i < 4; ++i) repeated |= first + i < vocab_size && penalties.seen[first + i] ? 1u << i : 0u;
#pragma unroll 1
    for (int place = node; place > 0; place = penalties.parents[place]) {  // the root is among the seen
      mark(repeated, penalties.tokens[place]);
    }
  }
  if (depth < penalties.shortest) {
#pragma unroll 1
    for (int i = 0; i < kMaxEos; ++i) mark(barred, static_cast<int>(penalties.eos[i]));
  }
  const auto change = [&](float value, uint32_t bit) {
    if (repeated & bit) {
      value = value < 0 ? value * penalties.repetition : __fdiv_rn(value, penalties.repetition);
    }
    return barred & bit ? -kInfinity : value;
  };
  return {change(x.x, 1), change(x.y, 2), change(x.z, 4), change(x.w, 8)};
}

// Four logits one by one, from a row that is no multiple of vectors: beyond its end come -inf.
template <LogitType kType>
static __device__ __noinline__ float4 load_singly(const void* logits, int first, int vocab_size) {
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = -kInfinity;
    if (first + i >= vocab_size) continue;
    if constexpr (kType == LogitType::kFloat) x[i] = static_cast<const float*>(logits)[first + i];
    if constexpr (kType == LogitType::kBfloat16) {
      x[i] = __bfloat162float(static_cast<const __nv_bfloat16*>(logits)[first + i]);
    }
    if constexpr (kType == LogitType::kHalf) x[i] = __half2float(static_cast<const __half*>(logits)[first + i]);
  }
  return {x[0], x[1], x[2], x[3]};
}

// One row of logits.
template <LogitType kType>
struct Row {
  static constexpr int kElementSize = kType == LogitType::kFloat ? 4 : 2;

  const char* logits;
  int vocab_size;

  __device__ __forceinline__ Row(const void* matrix, int64_t element, int vocab_size)
      : logits(static_cast<const char*>(matrix) + element * kElementSize), vocab_size(vocab_size) {}

  __device__ __forceinline__ float operator[](int token) const {
    if constexpr (kType == LogitType::kFloat) return reinterpret_cast<const float*>(logits)[token];
    if constexpr (kType == LogitType::kBfloat16) {
      return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(logits)[token]);
    }
    if constexpr (kType == LogitType::kHalf) return __half2float(reinterpret_cast<const __half*>(logits)[token]);
  }

  // Whether the row is made of aligned vectors of four logits.
  __device__ __forceinline__ bool vectors() const {
    return (reinterpret_cast<uintptr_t>(logits) % (4 * kElementSize) | vocab_size % 4) == 0;
  }

  // Four logits from `first` on; beyond the vocabulary come -inf.
  __device__ __forceinline__ float4 load(int first, bool vector) const {
    if (__builtin_expect(vector, true)) return load_vector(first);
    return load_singly<kType>(logits, first, vocab_size);
  }
  // The same of a row that is made of vectors, without a branch.
  __device__ __forceinline__ float4 load_vector(int first) const {
    const bool inside = first < vocab_size;
    if constexpr (kType == LogitType::kFloat) {
      return load_if(inside, reinterpret_cast<const float4*>(logits + 4 * first), -kInfinity);
    }
    constexpr uint32_t kNothing = kType == LogitType::kBfloat16 ? 0xff80ff80u : 0xfc00fc00u;  // -inf twice
    const uint2 bits = load_if(inside, reinterpret_cast<const uint2*>(logits + 2 * first), kNothing);
    if constexpr (kType == LogitType::kBfloat16) {
      return {__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u), __uint_as_float(bits.y << 16),
              __uint_as_float(bits.y & 0xffff0000u)};
    }
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
    return {low.x, low.y, high.x, high.y};
  }
};

using DraftRow = Row<LogitType::kFloat>;

// The first of the four tokens that this lane holds in vector j of a tile.
__device__ __forceinline__ int lane_token(int tile, int j) { return tile * kTile + j * 128 + lane_index() * 4; }

// Statistics of one tile of a row: its maximum, and its mass relative to that (or, for a greedy law, the bits of
// the first token that has it). A NaN mass (a negative token) marks a NaN or +inf among the logits.
struct alignas(8) TileStats {
  float maximum;
  float mass;
};

__device__ __forceinline__ float tile_maximum(const float4 (&x)[kVectors]) {
  float top = -kInfinity;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) top = fmaxf(top, fmaxf(fmaxf(x[j].x, x[j].y), fmaxf(x[j].z, x[j].w)));
  return warp_max(top);
}

__device__ __forceinline__ TileStats tile_statistics(const float4 (&x)[kVectors], float scale) {
  const float top = tile_maximum(x);
  // NaN and +inf make NaN of the mass: a check of their own is not needed.
  const float reference = top > -kInfinity ? top : 0.0f;
  const auto weight = [&](float logit) { return exp2_fast((logit - reference) * scale); };
  float mass = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    mass += (weight(x[j].x) + weight(x[j].y)) + (weight(x[j].z) + weight(x[j].w));
  }
  return {top, warp_sum(mass)};
}

__device__ __forceinline__ TileStats greedy_statistics(const float4 (&x)[kVectors], int tile) {
  const float top = tile_maximum(x);
  int token = INT32_MAX;
  bool bad = false;
#pragma unroll
  for (int j = kVectors - 1; j >= 0; --j) {
    const int first = lane_token(tile, j);
    if (x[j].w == top) token = first + 3;
    if (x[j].z == top) token = first + 2;
    if (x[j].y == top) token = first + 1;
    if (x[j].x == top) token = first;
    bad |= !(x[j].x < kInfinity) | !(x[j].y < kInfinity) | !(x[j].z < kInfinity) | !(x[j].w < kInfinity);
  }
  return {top, __int_as_float(__reduce_min_sync(kAllLanes, bad ? -1 : token))};
}

// What is known of a row. A token is kept if x >= threshold and its weight >= min_weight; its probability is its
// weight over the mass.
struct alignas(16) RowStats {
  float maximum;
  float threshold;
  float min_weight;
  float inverse_mass;
  int argmax;  // of a greedy law
  bool valid;  // false: the row defines no law

  __device__ __forceinline__ float weight(float scale, float x) const {
    const float weight = exp2_fast((x - maximum) * scale);
    return x >= threshold && weight >= min_weight ? weight : 0.0f;
  }
};

// Statistics of a row from those of its slices, some in each lane, by one warp; for laws that cut nothing.
template <int kCount>
__device__ __forceinline__ RowStats merge_slices(const TileStats (&slices)[kCount], float scale, bool greedy) {
  float maximum = -kInfinity, mass = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) maximum = fmaxf(maximum, slices[i].maximum);
  maximum = warp_max(maximum);
  if (greedy) {
    int argmax = INT32_MAX;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int token = __float_as_int(slices[i].mass);
      if (slices[i].maximum == maximum || token < 0) argmax = min(argmax, token);
    }
    argmax = __reduce_min_sync(kAllLanes, argmax);
    return {maximum, -kInfinity, 0.0f, 1.0f, argmax, argmax >= 0 && maximum > -kInfinity};
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // NaN of a row of nothing but -inf, which is none anyway.
    mass += slices[i].mass * exp2_fast((slices[i].maximum - maximum) * scale);
  }
  mass = warp_sum(mass);
  const bool valid = mass < kInfinity && maximum > -kInfinity;
  return {maximum, -kInfinity, 0.0f, __fdividef(1.0f, mass), 0, valid};
}

}  // namespace fastspec
