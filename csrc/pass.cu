// The host's side of a pass: what the device has room for, and which kernel.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "pass.cuh"

namespace fastspec {

int pass_bfloat16(const PassParams& params, const PassCall& call, void* stream);
int pass_half(const PassParams& params, const PassCall& call, void* stream);

static_assert(sizeof(CUtensorMap) == kTensorMapBytes);

int encode_matrix(const void* matrix, int64_t rows, int64_t depth, bool is_cache, void* map) {
  constexpr int kSince = 12000;  // the version of CUDA that brought the function
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = {};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kSince, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess || function == nullptr) return cudaErrorNotSupported;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  // [block][row][64] in memory as in shared memory.
  const cuuint64_t sizes[] = {kBoxBlock, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(depth / kBoxBlock)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * depth), 2 * kBoxBlock};
  const cuuint32_t weight_box[] = {kBoxBlock, kBoxRows, kChunk / kBoxBlock};
  const cuuint32_t cache_box[] = {kBoxBlock, kKeyGroup, static_cast<cuuint32_t>(depth / kBoxBlock)};
  const cuuint32_t* const box = is_cache ? cache_box : weight_box;
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result =
      encode(static_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(matrix), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int pass_slots(const PassParams& params) {
  int bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  bytes -= static_cast<int>(sizeof(PassShared));
  bytes -= PassPlan(params).bytes_behind_ring(params);
  return std::min(std::max(bytes, 0) / kSlotBytes, kMaxSlots);
}

int64_t pass_exchange_bytes(const PassParams& params) { return ExchangeLayout(params).bytes; }

int run_pass(const PassParams& params, const PassCall& call, void* stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return cudaErrorNotSupported;
  if (params.batch_size * params.num_rows > kMaxPassRows) return cudaErrorInvalidValue;
  if (params.type == LogitType::kBfloat16) return pass_bfloat16(params, call, stream);
  if (params.type == LogitType::kHalf) return pass_half(params, call, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastspec
