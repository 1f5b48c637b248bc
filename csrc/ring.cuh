// A ring of slots in shared memory that one warp fills by bulk copies and all consumer warps empty, in one order.
//
// A slot is full when its bytes have arrived and empty when every consumer warp has left it.
#pragma once

#include <cstdint>

#include "group.cuh"
#include "patience.cuh"

namespace fastspec {

constexpr int kMaxSlots = 26;

struct RingBarriers {
  uint64_t full[kMaxSlots], empty[kMaxSlots];
};

#if FASTSPEC_CLUSTERS
template <int kSlotBytes>
class Ring {
 public:
  __device__ __forceinline__ Ring(const char* slots, const RingBarriers& barriers, int num_slots)
      : slots_(shared_address(slots)),
        full_(shared_address(barriers.full)),
        empty_(shared_address(barriers.empty)),
        num_slots_(num_slots),
        nothing_(num_slots >> 16) {}

  // By one thread, before __syncthreads().
  __device__ __forceinline__ void start(int num_consumers) const {
    for (int slot = 0; slot < num_slots_; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_ + 8 * slot));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty_ + 8 * slot), "r"(num_consumers));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ __forceinline__ int num_slots() const { return num_slots_; }

  // The place of the n-th slot from here on; like all steps, n is at most the number of slots.
  struct Place {
    int slot;
    uint32_t turn;  // parity of how often the ring has gone round
  };
  __device__ __forceinline__ Place place(int n) const {
    const int slot = here_.slot + n;
    return slot < num_slots_ ? Place{slot, here_.turn} : Place{slot - num_slots_, here_.turn ^ 1};
  }
  __device__ __forceinline__ void advance(int n) {
    here_.slot += n;
    if (here_.slot >= num_slots_) here_.slot -= num_slots_, here_.turn ^= 1;
  }
  __device__ __forceinline__ uint32_t address(const Place& place) const { return slots_ + place.slot * kSlotBytes; }

  __device__ __forceinline__ void wait_full(const Place& place) const {
    wait(full_ + 8 * place.slot, place.turn, "a full slot:", place.slot);
  }
  // By all lanes of a consumer warp, when they have read what they need. An arrival can overtake loads that still wait
  // in the pipeline, behind others from device memory, and the slot would be filled again under them. So it is made to
  // depend on a register that the last of them writes.
  __device__ __forceinline__ void leave(const Place& place, uint32_t last_read) const {
    __syncwarp();
    if (lane_index() == 0) {
      const uint32_t barrier = empty_ + 8 * place.slot + (last_read & nothing_);
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    }
  }

  // By all lanes of the producer, when at most `under_way` slots, less than all, have yet to arrive; then copies,
  // `bytes` in all.
  __device__ __forceinline__ void acquire(int bytes, int under_way) const {
    wait(empty_ + 8 * here_.slot, here_.turn ^ 1, "an empty slot:", here_.slot);
    // A barrier that was never used counts as full in the turn before the first.
    const int before = here_.slot - under_way;
    wait_full(before >= 0 ? Place{before, here_.turn} : Place{before + num_slots_, here_.turn ^ 1});
    if (lane_index() == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full_ + 8 * here_.slot), "r"(bytes)
                   : "memory");
    }
    __syncwarp();
  }
  // A box of the matrix that a tensor map describes, from a row and a block of elements on; what lies outside of the
  // matrix arrives as zeros.
  __device__ __forceinline__ void copy_box(int offset, const void* map, int row, int block, uint64_t policy) const {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(address(here_) + offset),
        "l"(map), "r"(0), "r"(row), "r"(block), "r"(full_ + 8 * here_.slot), "l"(policy)
        : "memory");
  }

 private:
  __device__ __forceinline__ static void wait(uint32_t barrier, uint32_t parity, const char* what, int slot) {
    Patience patience(what, slot);
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
      patience.poll();
    } while (!done);
  }

  uint32_t slots_, full_, empty_;
  int num_slots_;
  uint32_t nothing_;  // zero, which the compiler cannot know
  Place here_ = {0, 0};
};

__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What is read once should not push out of the L2 what is read again.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t read_again() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

#endif  // FASTSPEC_CLUSTERS

}  // namespace fastspec
