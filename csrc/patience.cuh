// How long a wait may take.
#pragma once

#ifdef FASTSPEC_SPIN_LIMIT
#include <cstdio>
#endif

namespace fastspec {

// Counts the polls of a wait. Compiled with -DFASTSPEC_SPIN_LIMIT=n, whoever waits longer than n polls says where and
// traps.
class Patience {
 public:
  __device__ __forceinline__ Patience(const char* place, int detail) {
#ifdef FASTSPEC_SPIN_LIMIT
    place_ = place, detail_ = detail;
#else
    (void)place, (void)detail;
#endif
  }
  __device__ __forceinline__ void poll() {
#ifdef FASTSPEC_SPIN_LIMIT
    if (++polls_ < FASTSPEC_SPIN_LIMIT) return;
    printf("block %d thread %d waits for %s %d\n", blockIdx.x, threadIdx.x, place_, detail_);
    __trap();
#endif
  }

#ifdef FASTSPEC_SPIN_LIMIT
 private:
  const char* place_;
  int detail_;
  long long polls_ = 0;
#endif
};

}  // namespace fastspec
