// Rows of logits: reading them with penalties, statistics of tiles, and what makes a row of logits a law.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "params.h"
#include "reduce.cuh"

namespace fastspec {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kTile = 512;     // tokens that a warp reads at once, 16 per lane
constexpr int kVectors = 4;    // of four tokens, kTile / 4 apart from lane to lane
constexpr int kMaxTiles = kMaxVocab / kTile;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The sampling parameters of one sequence.
struct Law {
  float scale;  // log2(e) / temperature; the weight of a logit x is 2 ** ((x - max) * scale)
  bool greedy;
  int top_k;    // 0: all
  float min_p;  // 0: all
  double top_p;  // 1: all
  // Whether a row's threshold must be searched before its mass is known.
  __device__ __forceinline__ bool cuts() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
};

__device__ __forceinline__ Law load_law(const SamplingParams& sampling, int sequence, int vocab_size) {
  const float temperature = static_cast<float>(sampling.temperature[sequence]);
  const int64_t top_k = sampling.top_k[sequence];
  return {temperature > 0 ? fminf(kLog2e / temperature, 1e30f) : kLog2e, !(temperature > 0),
          top_k < vocab_size ? static_cast<int>(top_k) : 0, static_cast<float>(sampling.min_p[sequence]),
          sampling.top_p[sequence]};
}

// The law of log-weights as they are.
__device__ __forceinline__ Law plain_law() { return {kLog2e, false, 0, 0.0f, 1.0}; }

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
// fetch_tail below: most rows need neither, and a launch of microseconds waits for every instruction it has to fetch.
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
      value = value < 0 ? value * penalties.repetition : __fdividef(value, penalties.repetition);
    }
    return barred & bit ? -kInfinity : value;
  };
  return {change(x.x, 1), change(x.y, 2), change(x.z, 4), change(x.w, 8)};
}

// Four logits as they lie in memory; of 16-bit types only x and y are used.
using Raw = uint4;

// Four logits one by one, from an unaligned row or from the end of one: beyond it come -inf.
static __device__ __noinline__ Raw fetch_tail(const void* logits, LogitType type, int first, int vocab_size) {
  uint32_t x[4];
  const uint32_t nothing = type == LogitType::kFloat ? 0xff800000u : type == LogitType::kBfloat16 ? 0xff80u : 0xfc00u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = nothing;
    if (first + i < vocab_size) {
      x[i] = type == LogitType::kFloat ? static_cast<const uint32_t*>(logits)[first + i]
                                       : static_cast<const uint16_t*>(logits)[first + i];
    }
  }
  if (type == LogitType::kFloat) return {x[0], x[1], x[2], x[3]};
  return {x[0] | x[1] << 16, x[2] | x[3] << 16, 0, 0};
}

// One row of logits in any of the element types; a branch on the type is uniform over the launch.
struct Row {
  const void* logits;
  LogitType type;
  int vocab_size;

  __device__ __forceinline__ float operator[](int token) const {
    if (type == LogitType::kFloat) return static_cast<const float*>(logits)[token];
    if (type == LogitType::kBfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(logits)[token]);
    return __half2float(static_cast<const __half*>(logits)[token]);
  }

  // Whether vectors of four logits are aligned.
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(logits) % (type == LogitType::kFloat ? 16 : 8) == 0;
  }

  // Four logits from `first` on; beyond the vocabulary come -inf.
  __device__ __forceinline__ Raw fetch(int first, bool vector) const {
    if (!vector || first + 4 > vocab_size) return fetch_tail(logits, type, first, vocab_size);
    if (type == LogitType::kFloat) return *reinterpret_cast<const uint4*>(static_cast<const float*>(logits) + first);
    const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(logits) + first);
    return {bits.x, bits.y, 0, 0};
  }

  __device__ __forceinline__ float4 decode(Raw raw) const {
    if (type == LogitType::kFloat) {
      return {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w)};
    }
    if (type == LogitType::kBfloat16) {
      return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u), __uint_as_float(raw.y << 16),
              __uint_as_float(raw.y & 0xffff0000u)};
    }
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&raw.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&raw.y));
    return {low.x, low.y, high.x, high.y};
  }
};

// The first of the four tokens that this lane holds in vector j of a tile.
__device__ __forceinline__ int lane_token(int tile, int j) { return tile * kTile + j * 128 + lane_index() * 4; }

// Statistics of one tile of a row: its maximum, and its mass relative to that (or, for a greedy law, the bits of
// the first token that has it). A NaN mass (a negative token) marks a NaN or +inf among the logits.
struct TileStats {
  float maximum;
  float mass;
};

__device__ __forceinline__ TileStats tile_statistics(const float4 (&x)[kVectors], const Law& law, int tile,
                                                     int vocab_size) {
  float top = -kInfinity;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) top = fmaxf(top, fmaxf(fmaxf(x[j].x, x[j].y), fmaxf(x[j].z, x[j].w)));
  top = warp_max(top);
  if (law.greedy) {
    int token = vocab_size;
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
    token = __reduce_min_sync(kAllLanes, bad ? -1 : token);
    return {top, __int_as_float(token)};
  }
  // NaN and +inf make NaN of the mass: a check of their own is not needed.
  const float reference = fmaxf(top, -FLT_MAX);
  float mass = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    mass += (exp2_fast((x[j].x - reference) * law.scale) + exp2_fast((x[j].y - reference) * law.scale)) +
            (exp2_fast((x[j].z - reference) * law.scale) + exp2_fast((x[j].w - reference) * law.scale));
  }
  return {top, warp_sum(mass)};
}

// What is known of a row. A token is kept if x >= threshold and its weight >= min_weight; its probability is its
// weight over the mass.
struct RowStats {
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

// Statistics of a row from those of its tiles, by one warp; for laws that cut nothing.
__device__ __forceinline__ RowStats merge_tiles(const TileStats* tiles, int num_tiles, const Law& law,
                                                int vocab_size) {
  float maximum = -kInfinity;
  for (int tile = lane_index(); tile < num_tiles; tile += 32) maximum = fmaxf(maximum, tiles[tile].maximum);
  maximum = warp_max(maximum);
  if (law.greedy) {
    int argmax = vocab_size;
    for (int tile = lane_index(); tile < num_tiles; tile += 32) {
      const int token = __float_as_int(tiles[tile].mass);
      if (tiles[tile].maximum == maximum || token < 0) argmax = min(argmax, token);
    }
    argmax = __reduce_min_sync(kAllLanes, argmax);
    return {maximum, -kInfinity, 0.0f, 1.0f, argmax, argmax >= 0 && maximum > -kInfinity};
  }
  float mass = 0;
  for (int tile = lane_index(); tile < num_tiles; tile += 32) {
    mass += tiles[tile].mass * exp2_fast((fmaxf(tiles[tile].maximum, -FLT_MAX) - maximum) * law.scale);
  }
  mass = warp_sum(mass);
  return {maximum, -kInfinity, 0.0f, 1.0f / mass, 0, mass < kInfinity && maximum > -kInfinity};
}

}  // namespace fastspec
