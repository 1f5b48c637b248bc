// Reductions over a warp, in a fixed order.
#pragma once

#include <cstdint>

namespace fastspec {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kInfinity = INFINITY;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// Unsigned integers in the order of the floats; both zeros have one.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float warp_max(float value) {
  return from_ordered_key(__reduce_max_sync(kAllLanes, ordered_key(value)));
}

// How many of the lanes come before this one.
__device__ __forceinline__ int num_before(uint32_t lanes) { return __popc(lanes & ((1u << lane_index()) - 1)); }

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

// A score and the token it belongs to; the larger score wins, the lower id among equals.
struct alignas(8) Best {
  float score;
  int token;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  const bool second = b.score > a.score || (b.score == a.score && b.token < a.token);
  return second ? b : a;
}

__device__ __forceinline__ Best warp_best(Best mine) {
  const float score = warp_max(mine.score);
  return {score, __reduce_min_sync(kAllLanes, mine.score == score ? mine.token : INT32_MAX)};
}

// The winner so far of a lane's exponential race and four tokens from `first` on, of weights w and noise e.
__device__ __forceinline__ void race(const float (&w)[4], int first, const float4& e, Best& best) {
  const float scores[4] = {__fdividef(w[0], e.x), __fdividef(w[1], e.y), __fdividef(w[2], e.z), __fdividef(w[3], e.w)};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (w[j] > 0 && scores[j] > best.score) best = {scores[j], first + j};
  }
}

// Sum over the block of kThreads threads, to every thread. `scratch` holds kWarps values.
template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  value = warp_sum(value);
#ifndef FASTSPEC_PLANT_RACE  // the sanitizer job builds a variant without it, to see itself fail
  __syncthreads();
#endif
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  value = lane_index() < kWarps ? scratch[lane_index()] : T{0};
  return warp_sum(value);
}

}  // namespace fastspec
