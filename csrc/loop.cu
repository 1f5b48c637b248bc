// Cycles that the device repeats by itself: a WHILE node around a captured cycle and a kernel that decides whether to
// go on. The host may read along and may end sequences or the whole loop, but is never waited for.
#include <cuda_runtime.h>

#include "params.h"

namespace fastspec {

#if CUDART_VERSION >= 12040
namespace {

constexpr int kThreads = 128;

// One block, after each cycle: ends the sequences that the host wants ended, hands the report over, decides.
__global__ void __launch_bounds__(kThreads)
    turn_kernel(const __grid_constant__ LoopParams params, cudaGraphConditionalHandle again) {
  const int64_t turn = *params.turn, size = int64_t{params.batch_size} * params.width;
  const volatile int64_t* control = params.control;
  const int64_t most = control[0];
  bool running = false;
  for (int b = threadIdx.x; b < params.batch_size; b += kThreads) {
    if (params.reason[b] != params.running) continue;
    if (control[1 + b] != 0) {
      params.reason[b] = params.stopped;
    } else {
      running = true;
    }
  }
  int64_t* slot = params.ring + turn * size;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) slot[i] = params.report[i];
  const bool any = __syncthreads_or(running) != 0;
  if (threadIdx.x != 0) return;
  *params.turn = turn + 1;
  // The barrier orders the block's writes before the fence, and the fence orders them before this one for the host.
  __threadfence_system();
  *static_cast<volatile int64_t*>(params.published) = turn + 1;
  cudaGraphSetConditional(again, any && turn + 1 < most);
}

cudaError_t add_while(cudaGraphNode_t* node, cudaGraph_t graph, cudaGraphNode_t after, cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, &after, nullptr, 1, params);
#else
  return cudaGraphAddNode(node, graph, &after, 1, params);
#endif
}

cudaError_t fill_loop(LoopParams params, cudaGraph_t cycle, cudaGraph_t graph) {
  cudaGraphNode_t start, loop, work, turn;
  const cudaMemsetParams zero = {
      .dst = params.turn, .pitch = 0, .value = 0, .elementSize = 4, .width = sizeof(int64_t) / 4, .height = 1};
  cudaError_t error = cudaGraphAddMemsetNode(&start, graph, nullptr, 0, &zero);
  if (error != cudaSuccess) return error;

  cudaGraphConditionalHandle again;
  error = cudaGraphConditionalHandleCreate(&again, graph, 1, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams condition = {};
  condition.type = cudaGraphNodeTypeConditional;
  condition.conditional.handle = again;
  condition.conditional.type = cudaGraphCondTypeWhile;
  condition.conditional.size = 1;
  error = add_while(&loop, graph, start, &condition);
  if (error != cudaSuccess) return error;

  const cudaGraph_t body = condition.conditional.phGraph_out[0];
  error = cudaGraphAddChildGraphNode(&work, body, nullptr, 0, cycle);
  if (error != cudaSuccess) return error;
  void* arguments[] = {&params, &again};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(turn_kernel);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(kThreads);
  kernel.kernelParams = arguments;
  return cudaGraphAddKernelNode(&turn, body, &work, 1, &kernel);
}

template <typename T>
cudaError_t to_device(T*& host) {
  void* mapped = nullptr;
  const cudaError_t error = cudaHostGetDevicePointer(&mapped, const_cast<int64_t*>(host), 0);
  host = static_cast<T*>(mapped);
  return error;
}

}  // namespace

int make_loop(const LoopParams& params, void* cycle, LoopGraph* loop) {
  *loop = {};
  LoopParams mapped = params;
  for (const cudaError_t error : {to_device(mapped.ring), to_device(mapped.published), to_device(mapped.control)}) {
    if (error != cudaSuccess) return error;
  }
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaGraphCreate(&graph, 0);
  if (error != cudaSuccess) return error;
  loop->graph = graph;
  error = fill_loop(mapped, static_cast<cudaGraph_t>(cycle), graph);
  cudaGraphExec_t executable = nullptr;
  if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
  loop->executable = executable;
  if (error != cudaSuccess) {
    destroy_loop(loop);
    cudaGetLastError();  // or the next launch would report it once more
  }
  return error;
}

#else

int make_loop(const LoopParams&, void*, LoopGraph* loop) {
  *loop = {};
  return cudaErrorNotSupported;
}

#endif

int launch_loop(const LoopGraph& loop, void* stream) {
  return cudaGraphLaunch(static_cast<cudaGraphExec_t>(loop.executable), static_cast<cudaStream_t>(stream));
}

void destroy_loop(LoopGraph* loop) {
  if (loop->executable != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(loop->executable));
  if (loop->graph != nullptr) cudaGraphDestroy(static_cast<cudaGraph_t>(loop->graph));
  *loop = {};
}

}  // namespace fastspec
