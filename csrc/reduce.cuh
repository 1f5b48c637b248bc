// Reductions over a warp and over a block of kThreads threads, in a fixed order.
#pragma once

#include <cstdint>

namespace fastspec {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// A score and the token it belongs to; the larger score wins, the lower id among equals.
struct Best {
  float score;
  int token;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  const bool second = b.score > a.score || (b.score == a.score && b.token < a.token);
  return second ? b : a;
}

struct MaxOp {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct SumOp {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct BestOp {
  __device__ __forceinline__ Best operator()(Best a, Best b) const { return better(a, b); }
};

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lane) {
  return __shfl_xor_sync(kAllLanes, value, lane);
}
template <>
__device__ __forceinline__ Best shuffle_xor(Best value, int lane) {
  return {__shfl_xor_sync(kAllLanes, value.score, lane), __shfl_xor_sync(kAllLanes, value.token, lane)};
}

// Every lane gets the result over its group of `width` neighbouring lanes.
template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op, int width = 32) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    if (lane < width) value = op(value, shuffle_xor(value, lane));
  }
  return value;
}

// Every thread gets the result. `scratch` holds kWarps values and is free again after the next barrier.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = warp_reduce(value, op);
#ifndef FASTSPEC_PLANT_RACE  // the sanitizer job builds a variant without it, to see itself fail
  __syncthreads();
#endif
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  return warp_reduce(scratch[lane % kWarps], op, kWarps);
}

}  // namespace fastspec
