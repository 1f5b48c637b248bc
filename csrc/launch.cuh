// Launching groups of blocks: clusters where the device has them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "params.h"

namespace fastspec {

// Allows the kernel its shared memory and the largest clusters; returns a CUDA error code.
template <typename Kernel>
cudaError_t prepare_groups(Kernel kernel, int shared_bytes) {
  // Devices without clusters refuse this one; they are launched with groups of one.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaGetLastError();
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

struct GroupLaunch {
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};

  GroupLaunch(int num_groups, int group_size, int threads, int shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(group_size), 1, 1};
    config.gridDim = dim3(num_groups * group_size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = group_size > 1 ? 1 : 0;
  }
  GroupLaunch(const GroupLaunch&) = delete;  // the configuration points at the attribute
};

// Every block of a group must have something to tell the others in every turn (group.cuh).
inline int usable_group(int size, int num_shares) {
  while (size > num_shares) size /= 2;
  return size;
}

// Calls launch(type) with the element type as a constant.
template <typename Launch>
int for_type(LogitType type, Launch launch) {
  switch (type) {
    case LogitType::kFloat:
      return launch(std::integral_constant<LogitType, LogitType::kFloat>());
    case LogitType::kBfloat16:
      return launch(std::integral_constant<LogitType, LogitType::kBfloat16>());
    case LogitType::kHalf:
      return launch(std::integral_constant<LogitType, LogitType::kHalf>());
  }
  return cudaErrorInvalidValue;
}

// An attribute of the current device; 0 if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// The largest group that the current device can run of a kernel, at most 16.
template <typename Kernel>
int max_group_size(Kernel kernel, int threads, int shared_bytes) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 9 || prepare_groups(kernel, shared_bytes) != cudaSuccess) return 1;
  for (int size = 16; size > 1; size /= 2) {
    const GroupLaunch launch(1, size, threads, shared_bytes, nullptr);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess && clusters > 0) return size;
    cudaGetLastError();
  }
  return 1;
}

}  // namespace fastspec
