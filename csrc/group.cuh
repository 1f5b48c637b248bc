// The blocks that work on one sequence: a thread block cluster on sm_90 and up, a single block before.
#pragma once

#include <cooperative_groups.h>

namespace fastspec {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTSPEC_CLUSTERS 1
#else
#define FASTSPEC_CLUSTERS 0
#endif

__device__ __forceinline__ int group_size() {
#if FASTSPEC_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}

__device__ __forceinline__ int group_rank() {
#if FASTSPEC_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}

// Barrier over all threads of the group; orders their shared, distributed shared and global memory.
__device__ __forceinline__ void group_sync() {
#if FASTSPEC_CLUSTERS
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The two halves of group_sync(): announce, work on, wait. No block may touch the shared memory of another before
// all of them have started, so the first access of a kernel stands behind such a pair.
__device__ __forceinline__ void group_arrive() {
#if FASTSPEC_CLUSTERS
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}

__device__ __forceinline__ void group_wait() {
#if FASTSPEC_CLUSTERS
  cooperative_groups::this_cluster().barrier_wait();
#else
  __syncthreads();
#endif
}

// The same variable in the shared memory of another block of the group.
template <typename T>
__device__ __forceinline__ T* in_block(T* variable, int rank) {
#if FASTSPEC_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(variable, rank);
#else
  return variable;
#endif
}

}  // namespace fastspec
