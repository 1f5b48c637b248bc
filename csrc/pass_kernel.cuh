// The kernel of a pass and its launch; instantiated in pass_bfloat16.cu and pass_half.cu.
#pragma once

#include <cuda_runtime.h>

#include "pass_attention.cuh"
#include "pass_linear.cuh"

namespace fastspec {

#if FASTSPEC_CLUSTERS

// Where every row stands: its position for RoPE, and the cache row for its key and value. A prefix that would leave
// the cache is cut.
__device__ __forceinline__ void place_rows(const PassParams& params, const PassCall& call, PassShared& shared) {
  const int index = static_cast<int>(threadIdx.x);
  const auto prefix = [&](int sequence) {
    const int64_t most = params.capacity - params.num_slots;
    return static_cast<int>(min(max(call.prefix[sequence], int64_t{0}), most));
  };
  if (index < params.batch_size) shared.prefix[index] = prefix(index);
  if (index < params.batch_size * params.num_rows) {
    const int row = index % params.num_rows, start = prefix(index / params.num_rows);
    shared.position[index] = start + params.num_visible[row] - 1;
    shared.cache_row[index] = start + params.first_slot + row;
  }
}

// The features of the residual stream that this block owns, of all rows.
template <typename T, int kTiles>
__device__ __forceinline__ void embed(const PassContext<T, kTiles>& context) {
  const PassParams& params = context.params;
  const T* const norm = static_cast<const T*>(context.layers()[0].input_norm);
  char* const normed = context.exchange(0) + context.plan.exchange.normed[0];
  float* const squares = reinterpret_cast<float*>(context.exchange(0) + context.plan.exchange.squares[0]);
  for (int i = static_cast<int>(threadIdx.x); i < context.owned() * kTiles * 64; i += kConsumers) {
    const int own = i / 64 / kTiles, row = i / 64 % kTiles * 8 + i / 8 % 8, g = i % 8;
    const int feature = (static_cast<int>(blockIdx.x) + own * params.num_blocks) * params.residual_tile + g;
    float2 value = {}, weight = {};
    if (row < context.plan.rows) {
      int64_t token = context.call.token_ids[row];
      if (token < 0 || token >= params.embedding_rows) token = 0;
      const T* const features = static_cast<const T*>(params.embedding) + token * params.hidden_size + feature;
      value.x = to_float(features[0]), weight.x = to_float(norm[feature]);
      if (params.residual_tile == 16) value.y = to_float(features[8]), weight.y = to_float(norm[feature + 8]);
    }
    context.settle(own, row, g, value, weight, normed, squares);
  }
}

// By one thread: until the buffer of a layer may be written to.
__device__ __forceinline__ void wait_for_sweepers(const PassShared& shared, int layer) {
  Patience patience("the sweepers before layer", layer);
  while (heard(&shared.swept) < layer) patience.poll();
}

template <typename T, int kTiles>
__device__ __forceinline__ void produce(PassContext<T, kTiles>& context) {
  const PassParams& params = context.params;
  const uint64_t weights = read_once(), prefix = read_again();
  const int last = kLayerSteps * params.num_layers;
  if (lane_index() < 2) prefetch_map(lane_index() == 0 ? params.key_map : params.value_map);
  for (int index = 0; index <= last; ++index) {
    // The weights' map of the step after the next, which costs a trip to memory.
    if (index + 2 <= last && step_at(params, index + 2) != Step::kAttention && lane_index() == 0) {
      prefetch_map(share_at(context, index + 2).weight);
    }
    if (step_at(params, index) == Step::kAttention) {
      stream_prefix(context, index / kLayerSteps, prefix);
    } else {
      stream_weights(context, index, weights);
    }
  }
}

template <typename T, int kTiles>
__device__ __forceinline__ void consume(PassContext<T, kTiles>& context) {
  const PassParams& params = context.params;
  const auto note = [&](int place) {
    if (context.call.clock == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(context.call.clock[place])::"memory");
  };
  PassShared& shared = context.shared;
  const int last = kLayerSteps * params.num_layers;
  note(0);
  embed(context);
  if (threadIdx.x == 0) shared.linear[0] = linear_at(context, 0);
  for (int index = 0; index <= last; ++index) {
    const int layer = index / kLayerSteps;
    const Step step = step_at(params, index);
    if (threadIdx.x == 0 && step == Step::kDown) wait_for_sweepers(shared, layer + 1);
    sync_consumers();
    note(index + 1);
    if (threadIdx.x == 0) {
      if (step == Step::kQkv) announce(&shared.ended, layer);
      if (index < last) shared.linear[(index + 1) % 2] = linear_at(context, index + 1);
    }
    if (step != Step::kAttention) {
      LinearStep<T, kTiles>(context, shared.linear[index % 2]).run();
    } else if (params.head_dim == 128) {
      AttentionStep<T, kTiles, 128>(context, layer).run();
    } else {
      AttentionStep<T, kTiles, 64>(context, layer).run();
    }
  }
  note(last + 2);
}

#endif  // FASTSPEC_CLUSTERS

// kTiles * 8 rows at most.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kPassThreads, 1)
    pass_kernel(const __grid_constant__ PassParams params, const __grid_constant__ PassCall call,
                const __grid_constant__ PassPlan plan) {
#if FASTSPEC_CLUSTERS
  PassContext<T, kTiles> context(params, call, plan);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    context.ring.start(kConsumerWarps);
    PassShared& shared = context.shared;
    shared.launches = *reinterpret_cast<const uint64_t*>(params.counters + 2);
    shared.first_buffer = static_cast<int>(shared.launches * (params.num_layers + 1) % kExchanges);
    shared.ended = shared.swept = 0;
  }
  constexpr int kWords = sizeof(PassLayer) / sizeof(uint64_t);
  for (int i = thread; i < params.num_layers * kWords; i += kPassThreads) {
    reinterpret_cast<uint64_t*>(context.layers())[i] = reinterpret_cast<const uint64_t*>(params.layers)[i];
  }
  place_rows(params, call, context.shared);
  __syncthreads();
  if (warp_index() < kConsumerWarps) {
    if constexpr (kTakesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(context);
  } else {
    if constexpr (kTakesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp_index() == kConsumerWarps) {
      produce(context);
    } else if (warp_index() == kConsumerWarps + 1) {
      Sweeper(params, plan.exchange.bytes, context.shared.first_buffer)
          .run(&context.shared.ended, &context.shared.swept);
    }
  }
#endif
}

template <typename T, int kTiles>
int launch_pass(const PassParams& params, const PassCall& call, void* stream) {
  PassPlan plan(params);
  plan.num_slots = pass_slots(params);
  if (plan.num_slots < kMinSlots) return cudaErrorInvalidConfiguration;
  const auto kernel = pass_kernel<T, kTiles>;
  const int bytes = static_cast<int>(sizeof(PassShared)) + plan.num_slots * kSlotBytes + plan.bytes_behind_ring(params);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(params.num_blocks);
  config.blockDim = dim3(kPassThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params, call, plan);
}

template <typename T>
int launch_pass(const PassParams& params, const PassCall& call, void* stream) {
  switch (padded_rows(params.batch_size * params.num_rows)) {
    case 8:
      return launch_pass<T, 1>(params, call, stream);
    case 16:
      return launch_pass<T, 2>(params, call, stream);
    case 32:
      return launch_pass<T, 4>(params, call, stream);
    case 64:
      return launch_pass<T, 8>(params, call, stream);
    default:
      return launch_pass<T, 16>(params, call, stream);
  }
}

}  // namespace fastspec
