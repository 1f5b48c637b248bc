// After verification: the accepted path's rows of the cache made contiguous, then tokens, lengths and stops of every
// sequence. Two launches, so that the second may move the lengths which the first reads.
#include <cuda_runtime.h>

#include "params.h"

namespace fastspec {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;

// One warp per sequence; lane i looks at steps i, i + 32, ... of the path.
__global__ void commit_kernel(const __grid_constant__ CommitParams params) {
  const int b = blockIdx.x, lane = threadIdx.x, steps = params.path_length;
  const int64_t* path = params.path + b * steps;
  const int64_t* tree_tokens = params.tree_tokens + b * params.num_nodes;
  const int64_t* eos = params.eos_token_ids + b * kMaxEos;
  const int64_t accepted = params.num_accepted[b], length = params.num_tokens[b];
  const int64_t room = params.max_tokens[b] - length;
  const bool running = params.reason[b] == params.running, invalid = params.invalid[b];
  const auto token_at = [&](int64_t step) {
    return step < accepted ? tree_tokens[path[step + 1]] : params.next_token[b];
  };

  const int64_t decided = accepted + !invalid;
  int64_t before_eos = steps;
  for (int first = 0; first < steps; first += kLanes) {
    const int64_t step = first + lane;
    bool ends = false;
    if (step < decided) {
      const int64_t token = token_at(step);
      for (int i = 0; i < kMaxEos; ++i) ends |= token == eos[i] && token >= 0;
    }
    const unsigned found = __ballot_sync(kAll, ends);
    if (found != 0) {
      before_eos = first + __ffs(found) - 1;
      break;
    }
  }
  const int64_t most = min(decided, room);
  const bool ends = before_eos < most;
  const bool out_of_room = !ends && decided >= room;
  const int64_t count = running ? (ends ? before_eos + 1 : most) : 0;
  const int64_t drafted = min(count, accepted);

  int64_t* report = params.report + b * (steps + kReportTokens);
  int64_t* tokens = params.tokens + b * params.tokens_stride;
  for (int64_t step = lane; step < count; step += kLanes) {
    const int64_t token = token_at(step);
    tokens[length + step] = token;
    params.new_tokens[b * steps + step] = token;
    report[kReportTokens + step] = token;
    params.seen[b * params.vocab_size + token] = 1;
  }
  __syncwarp();
  if (lane != 0) return;
  if (count > 0) params.tree_tokens[b * params.num_nodes] = tokens[length + count - 1];
  params.num_tokens[b] = length + count;
  params.num_new[b] = count;
  params.num_drafted[b] = drafted;
  if (running) {
    params.reason[b] = ends ? params.ended : out_of_room ? params.full : invalid ? params.failed : params.running;
    if (!params.first) {
      params.cycles[b] += 1;
      params.committed[b] += count;
      params.accepted[b * steps + drafted] += 1;
    }
  }
  report[0] = count;
  report[1] = drafted;
  report[2] = params.reason[b];
}

constexpr int kCompactWarps = 8;

// One warp per (layer, sequence, head, keys or values). Paths ascend and node i of a path lies at row i or later, so
// moving the rows in order never overwrites one that is still to move.
__global__ void compact_kernel(const __grid_constant__ CompactParams params) {
  const int lane = threadIdx.x % kLanes;
  const int64_t heads = int64_t{params.num_layers} * params.batch_size * params.num_heads;
  const int64_t index = int64_t{blockIdx.x} * kCompactWarps + threadIdx.x / kLanes;
  if (index >= 2 * heads) return;
  const int64_t head = index % heads;
  const int b = head / params.num_heads % params.batch_size;
  const int64_t first = params.num_tokens[b] - 1;
  const int64_t* path = params.path + b * params.path_length;
  char* rows = static_cast<char*>(index < heads ? params.keys : params.values) +
               (head * params.capacity + first) * params.row_bytes;
  for (int step = 1; step <= params.num_accepted[b]; ++step) {
    const int64_t source = path[step];
    if (source == step) continue;
    for (int at = lane * 4; at < params.row_bytes; at += kLanes * 4) {
      *reinterpret_cast<int*>(rows + step * int64_t{params.row_bytes} + at) =
          *reinterpret_cast<const int*>(rows + source * params.row_bytes + at);
    }
  }
}

}  // namespace

int commit(const CommitParams& params, void* stream) {
  commit_kernel<<<params.batch_size, kLanes, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

int compact(const CompactParams& params, void* stream) {
  const int64_t warps = int64_t{2} * params.num_layers * params.batch_size * params.num_heads;
  if (warps == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((warps + kCompactWarps - 1) / kCompactWarps);
  compact_kernel<<<blocks, kCompactWarps * kLanes, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

}  // namespace fastspec
