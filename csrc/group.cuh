// The blocks that propose from one row: a thread block cluster on sm_90 and up, a single block before.
//
// What they tell each other goes by asynchronous stores into each other's shared memory, counted by the receiver. A
// cluster barrier in its place would order all memory, which empties the L1 cache and takes most of a microsecond.
#pragma once

#include <cstdint>

#include "reduce.cuh"

namespace fastspec {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTSPEC_CLUSTERS 1
#else
#define FASTSPEC_CLUSTERS 0
#endif

__device__ __forceinline__ int group_size() {
#if FASTSPEC_CLUSTERS
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}

__device__ __forceinline__ int group_rank() {
#if FASTSPEC_CLUSTERS
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}

#if FASTSPEC_CLUSTERS
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The address of the same variable in the shared memory of another block.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(address), "r"(rank));
  return other;
}
#endif

// A sequence of exchanges in which every block gets the same number of bytes from all blocks. Turn t uses half t & 1
// of the buffers: a block sends for turn t + 1 when it has all of turn t, so nobody reads that half any more.
class Exchange {
 public:
  // First by all threads, then, before anything is sent, meet().
  __device__ __forceinline__ void arrive() {
#if FASTSPEC_CLUSTERS
    if (threadIdx.x == 0) {
      for (int half = 0; half < 2; ++half) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&received_[half])));
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }

  // All blocks have started; orders the shared memory of this block as __syncthreads() does.
  __device__ __forceinline__ void meet() {
    __syncthreads();  // and brings the threads of a warp together, as the cluster's barrier needs them
#if FASTSPEC_CLUSTERS
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // By one thread: how many bytes this block will get.
  __device__ __forceinline__ void expect(int turn, int bytes) {
#if FASTSPEC_CLUSTERS
    if (group_size() == 1) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&received_[turn & 1])),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // Waits for them; by all threads of the block, which must meet once before the next turn but one.
  __device__ __forceinline__ void wait(int turn) {
#if FASTSPEC_CLUSTERS
    if (group_size() > 1) return poll(turn);
#endif
    __syncthreads();
  }

  __device__ __forceinline__ const uint64_t* received(int turn) const { return &received_[turn & 1]; }

 private:
#if FASTSPEC_CLUSTERS
  __device__ __forceinline__ void poll(int turn) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(&received_[turn & 1])),
        "r"(turn >> 1 & 1)
        : "memory");
  }
#endif

  uint64_t received_[2];
};

// An array in the shared memory of every block of the group: each of the first lanes of a warp writes to one block.
template <typename T>
class Broadcast {
 public:
  __device__ __forceinline__ Broadcast(T* array, const Exchange& exchange, int turn) : array_(array) {
#if FASTSPEC_CLUSTERS
    const int rank = lane_index() % group_size();
    address_ = address_in_block(shared_address(array), rank);
    received_ = address_in_block(shared_address(exchange.received(turn)), rank);
#endif
  }

  // By all lanes of a warp, with the same value.
  __device__ __forceinline__ void store(int index, const T& value) const {
    static_assert(sizeof(T) == 8 || sizeof(T) % 16 == 0);
#if FASTSPEC_CLUSTERS
    if (lane_index() >= group_size()) return;
    if (group_size() == 1) {  // asynchronous stores need a second block
      array_[index] = value;
      return;
    }
    const uint32_t address = address_ + index * static_cast<uint32_t>(sizeof(T));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&value);
    if constexpr (sizeof(T) == 8) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(address),
          "r"(words[0]), "r"(words[1]), "r"(received_));
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T)) / 4; i += 4) {
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                address + 4 * i),
            "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]), "r"(received_));
      }
    }
#else
    if (lane_index() == 0) array_[index] = value;
#endif
  }

 private:
  T* array_;
#if FASTSPEC_CLUSTERS
  uint32_t address_, received_;
#endif
};

}  // namespace fastspec
