// How the blocks of a pass hand activations to each other: in device memory, by words that tell themselves whether
// they have come. Before a word is written all its bits are set, which no result has: arithmetic makes another NaN. Who
// needs it reads until it is something else. So there is no fence and no barrier of the grid between two steps, and a
// step begins with what it has while slower blocks still work on the rest.
//
// Layers take turns with kExchanges buffers, and the head with them. One warp of each block, the sweeper, follows
// behind: when all blocks have ended a layer, it sets all bits of its share of that layer's buffer again; the next
// launch does so with the last two buffers. Before a step writes to the buffer of the next layer, it asks whether the
// sweepers of all blocks are that far; they have had nearly a layer's time.
#pragma once

#include "group.cuh"
#include "params.h"

namespace fastspec {

// Where the parts of an exchange buffer begin, in bytes; a feature of a row takes two.
struct ExchangeLayout {
  // What the qkv step and the gate and up step read, the second index below: the residual stream times the norm's
  // weights, and the sums of squares [rows, tiles of the residual stream].
  int64_t normed[2], squares[2];
  int64_t qkv, mixed, gated;
  int64_t bytes;

  explicit ExchangeLayout(const PassParams& params) {
    const int64_t rows = params.batch_size * params.num_rows;
    const int64_t hidden = 2 * rows * params.hidden_size;
    const int64_t heads = 2 * rows * params.num_heads * params.head_dim;
    normed[0] = 0, normed[1] = hidden;
    qkv = 2 * hidden;
    mixed = qkv + heads + 4 * rows * params.num_kv_heads * params.head_dim;
    gated = mixed + heads;
    squares[0] = gated + 2 * rows * params.ffn_size;
    squares[1] = squares[0] + 4 * rows * (params.hidden_size / params.residual_tile);
    bytes = (2 * squares[1] - squares[0] + 15) / 16 * 16;
  }
};

#if FASTSPEC_CLUSTERS

constexpr uint32_t kAbsent = 0xffffffffu;

__device__ __forceinline__ void hand_over(void* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

// What has come so far.
__device__ __forceinline__ uint32_t look_at(const uint32_t* word) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(word) : "memory");
  return x;
}
__device__ __forceinline__ uint2 look_at(const uint2* words) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(words) : "memory");
  return x;
}
__device__ __forceinline__ uint4 look_at(const uint4* words) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(words)
               : "memory");
  return x;
}

__device__ __forceinline__ bool is_absent(uint32_t x) { return x == kAbsent; }
__device__ __forceinline__ bool is_absent(uint2 x) { return x.x == kAbsent || x.y == kAbsent; }
__device__ __forceinline__ bool is_absent(uint4 x) {
  return x.x == kAbsent || x.y == kAbsent || x.z == kAbsent || x.w == kAbsent;
}

// A number that one warp of a block tells others.
__device__ __forceinline__ void announce(const int* where, int number) {
  asm volatile("st.release.cta.shared.s32 [%0], %1;" ::"r"(shared_address(where)), "r"(number) : "memory");
}
__device__ __forceinline__ int heard(const int* where) {
  int number;
  asm volatile("ld.acquire.cta.shared.s32 %0, [%1];" : "=r"(number) : "r"(shared_address(where)) : "memory");
  return number;
}

// By all lanes of a warp of each block.
class Sweeper {
 public:
  __device__ __forceinline__ Sweeper(const PassParams& params, int64_t buffer_bytes, int first_buffer)
      : params_(params), bytes_(buffer_bytes), first_buffer_(first_buffer) {}

  // Follows a launch. `ended` is the number of layers that this block has ended, `swept` the last layer whose buffer
  // may be written to. When all have met after a layer, each has swept its share of the buffer that the next layer but
  // one will use, which is that of the layer before.
  __device__ __forceinline__ void run(const int* ended, int* swept) {
    // The last two buffers of the launch before this one.
    sweep(-2);
    sweep(-1);
    meet(1);
    tell(swept, 1);
    for (int layer = 0; layer + 1 < params_.num_layers; ++layer) {
      while (heard(ended) <= layer) __nanosleep(kNap);
      meet(layer + 2);
      sweep(layer);
      tell(swept, layer + 2);
    }
    leave();
  }

 private:
  static constexpr int kNap = 100;  // ns

  __device__ __forceinline__ void sweep(int layer) const {
    char* const buffer =
        static_cast<char*>(params_.exchange) + (first_buffer_ + layer + kExchanges) % kExchanges * bytes_;
    const int64_t step = 16 * 32 * static_cast<int64_t>(params_.num_blocks);
    for (int64_t at = 16 * (32 * static_cast<int64_t>(blockIdx.x) + lane_index()); at < bytes_; at += step) {
      *reinterpret_cast<uint4*>(buffer + at) = {kAbsent, kAbsent, kAbsent, kAbsent};
    }
  }

  // Waits until the sweepers of all blocks have come here for the n-th time.
  __device__ __forceinline__ void meet(int n) const {
    __syncwarp();
    if (lane_index() == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(params_.counters) : "memory");
      const uint32_t target = static_cast<uint32_t>(n * params_.num_blocks);
      uint32_t arrived;
      while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(params_.counters) : "memory");
        if (arrived >= target) break;
        __nanosleep(kNap);
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ static void tell(int* swept, int number) {
    __syncwarp();
    if (lane_index() == 0) announce(swept, number);
  }

  // The last of all makes the counters ready for the next launch.
  __device__ __forceinline__ void leave() const {
    if (lane_index() != 0) return;
    const uint32_t others = static_cast<uint32_t>(params_.num_blocks) - 1;
    if (atomicInc(params_.counters + 1, others) != others) return;
    params_.counters[0] = 0;
    ++*reinterpret_cast<uint64_t*>(params_.counters + 2);
  }

  const PassParams& params_;
  const int64_t bytes_;
  const int first_buffer_;
};

#endif  // FASTSPEC_CLUSTERS

}  // namespace fastspec
