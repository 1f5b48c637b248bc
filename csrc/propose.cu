// The draft's own sampling in one launch: for each inner node of a level the law q (written as log-weights) and
// the children drawn from it, in draw order.
//
// A group of blocks (a cluster on sm_90) works on one row:
//
//   1. statistics   the maximum over the group; or, for laws that cut tokens, one block finds the threshold
//   2. draws        one race per child: each picks the best score after the last one, so the children come as
//                   Gumbel top-k without replacement does, or as the most likely tokens where nothing is drawn

#include "group.cuh"
#include "launch.cuh"
#include "params.h"
#include "philox.cuh"
#include "rows.cuh"

namespace fastspec {
namespace {

constexpr int kPassTile = 4 * kThreads;
constexpr int kMaxPassTiles = kMaxVocab / kPassTile;
constexpr int kMaxGroup = 16;

struct Shared {
  RowScratch scratch;
  RowStats stats;
  float maxima[kMaxGroup];
  Best winners[2][kMaxPassTiles];
  int tokens[kMaxNodes];
  int parents[kMaxNodes];
};

// One row of one sequence; what all threads of the group agree on.
struct Task {
  Row row;
  Law law;
  NoiseKey key;
  float* log_weights;  // [V]
  bool noisy;          // drawn at random rather than by rank
  bool uniform;        // the row is no law: all tokens count alike
};

// Four neighbouring logits as the draft's law sees them.
__device__ __forceinline__ float4 load_scores(const Task& task, int first, int vocab_size) {
  if (!task.uniform) return task.row.load(first, task.row.aligned());
  const auto score = [&](int token) { return token < vocab_size ? 0.0f : -kInfinity; };
  return {score(first), score(first + 1), score(first + 2), score(first + 3)};
}

// What the children are ranked by: the race w / e, or the logit itself; -inf where a token cannot be proposed.
__device__ __forceinline__ float4 rank_scores(const Task& task, const RowStats& stats, float4 x, int first) {
  if (!task.noisy) return x;
  float ranked[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) ranked[i] = weight_of(stats, task.law.scale, ranked[i]);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const bool any = ranked[i] > 0 || ranked[i + 1] > 0;
    const uint4 words = any ? philox_block(task.key, static_cast<uint32_t>((first + i) / 2)) : uint4{};
    ranked[i] = ranked[i] > 0 ? ranked[i] / exponential(words.x, words.y) : -kInfinity;
    ranked[i + 1] = ranked[i + 1] > 0 ? ranked[i + 1] / exponential(words.z, words.w) : -kInfinity;
  }
  return {ranked[0], ranked[1], ranked[2], ranked[3]};
}

__device__ __forceinline__ void write_log_weights(const Task& task, const RowStats& stats, float4 x, int first,
                                                  int vocab_size, int argmax) {
  const float inverse_log2e = 0.6931471805599453f;
  const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= vocab_size) continue;
    float log_weight;
    if (task.law.greedy) {
      log_weight = first + i == argmax ? 0.0f : -kInfinity;
    } else {
      const bool kept = weight_of(stats, task.law.scale, values[i]) > 0;
      log_weight = kept ? (values[i] - stats.maximum) * task.law.scale * inverse_log2e : -kInfinity;
    }
    task.log_weights[first + i] = log_weight;
  }
}

// The maximum and validity of the row over the group, or its threshold by the group's first block.
__device__ __forceinline__ RowStats group_statistics(const ProposeParams& params, Shared& shared, const Task& task,
                                                     int num_tiles) {
  if (task.law.cuts() && !task.law.greedy) {
    if (group_rank() == 0) {
      const RowStats stats = row_statistics(task.row, task.law, shared.scratch);
      group_wait();
      if (static_cast<int>(threadIdx.x) < group_size()) *in_block(&shared.stats, threadIdx.x) = stats;
    } else {
      group_wait();
    }
    group_sync();
    return shared.stats;
  }
  float maximum = -kInfinity;
  bool bad = false;
#pragma unroll 1
  for (int tile = group_rank(); tile < num_tiles; tile += group_size()) {
    const float4 x = task.row.load(tile * kPassTile + 4 * static_cast<int>(threadIdx.x), task.row.aligned());
    bad |= !(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity);
    maximum = fmaxf(maximum, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  }
  maximum = block_reduce(maximum, MaxOp(), shared.scratch.floats);
  if (__syncthreads_or(bad)) maximum = NAN;
  group_wait();
  if (static_cast<int>(threadIdx.x) < group_size()) {
    *in_block(&shared.maxima[group_rank()], threadIdx.x) = maximum;
  }
  group_sync();
  RowStats stats = {};
  stats.maximum = -kInfinity;
  stats.threshold = -kInfinity;
  stats.valid = 1;
  for (int rank = 0; rank < group_size(); ++rank) {
    if (isnan(shared.maxima[rank])) stats.valid = 0;
    stats.maximum = fmaxf(stats.maximum, shared.maxima[rank]);
  }
  if (!(stats.maximum > -kInfinity)) stats.valid = 0;
  return stats;
}

__global__ void __launch_bounds__(kThreads, 1) propose_kernel(const __grid_constant__ ProposeParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  group_arrive();
  const int group = static_cast<int>(blockIdx.x) / group_size();
  const int sequence = group / params.num_rows, row = group % params.num_rows;
  const SamplingParams& sampling = params.sampling;

  for (int node = threadIdx.x; node < params.num_nodes; node += kThreads) {
    shared.tokens[node] = static_cast<int>(params.tokens[sequence * params.tokens_stride + node]);
    shared.parents[node] = params.tree[node].parent;
  }
  const int node = params.tree[params.first_inner + row].inner_node;
  const TreeNode place = params.tree[node];
  const int64_t position = params.positions[sequence];
  const int element_size = params.logit_type == LogitType::kFloat ? 4 : 2;
  const int64_t source = static_cast<int64_t>(sequence) * params.num_rows + row;
  const int64_t target = static_cast<int64_t>(sequence) * params.num_inner + params.first_inner + row;
  Task task;
  task.row = {static_cast<const char*>(params.logits) + source * params.logits_stride * element_size,
              params.logit_type,
              min(params.draft_vocab_size, params.vocab_size),
              {static_cast<float>(sampling.repetition_penalty[sequence]),
               position + params.level < sampling.min_tokens[sequence], node, shared.tokens, shared.parents,
               sampling.seen + static_cast<int64_t>(sequence) * params.vocab_size,
               sampling.eos_token_ids + sequence * kMaxEos}};
  task.law = load_law(sampling, sequence, params.vocab_size);
  task.key = params.rule == Rule::kDrafterInvariant
                 ? noise_key(sampling.seed[sequence], position + params.level, Stream::kCoupled, 0)
                 : noise_key(sampling.seed[sequence], position, Stream::kDraft, node);
  task.log_weights = params.draft_logits + target * params.vocab_size;
  task.noisy = !task.law.greedy && params.rule != Rule::kTargetOnly;
  task.uniform = false;
  __syncthreads();

  const int num_tiles = (params.vocab_size + kPassTile - 1) / kPassTile;
  RowStats stats = group_statistics(params, shared, task, num_tiles);
  if (!stats.valid) {
    task.uniform = true;
    stats.maximum = 0;
    stats.threshold = -kInfinity;
    stats.min_weight = 0;
  }

  const bool keeps_scores = num_tiles <= group_size();
  float4 scores = {};
  Best last = {kInfinity, -1};
  int64_t* children = params.tokens + sequence * params.tokens_stride + place.first_child;
#pragma unroll 1
  for (int child = 0; child < place.num_children; ++child) {
    const int parity = child & 1;
#pragma unroll 1
    for (int tile = group_rank(); tile < num_tiles; tile += group_size()) {
      const int first = tile * kPassTile + 4 * static_cast<int>(threadIdx.x);
      if (child == 0 || !keeps_scores) {
        const float4 x = load_scores(task, first, params.vocab_size);
        if (child == 0 && !task.law.greedy) write_log_weights(task, stats, x, first, params.vocab_size, -1);
        scores = rank_scores(task, stats, x, first);
      }
      const float ranked[4] = {scores.x, scores.y, scores.z, scores.w};
      Best best = {-kInfinity, params.vocab_size};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool drawn = ranked[i] > last.score || (ranked[i] == last.score && first + i <= last.token);
        if (!drawn) best = better(best, {ranked[i], first + i});
      }
      best = block_reduce(best, BestOp(), shared.scratch.bests);
      if (static_cast<int>(threadIdx.x) < group_size()) {
        *in_block(&shared.winners[parity][tile], threadIdx.x) = best;
      }
    }
    group_sync();
    Best best = {-kInfinity, params.vocab_size};
    for (int tile = threadIdx.x % 32; tile < num_tiles; tile += 32) best = better(best, shared.winners[parity][tile]);
    last = warp_reduce(best, BestOp());
    if (child == 0 && task.law.greedy) {
#pragma unroll 1
      for (int tile = group_rank(); tile < num_tiles; tile += group_size()) {
        write_log_weights(task, stats, {}, tile * kPassTile + 4 * static_cast<int>(threadIdx.x), params.vocab_size,
                          last.token);
      }
    }
    if (group_rank() == 0 && threadIdx.x == 0) children[child] = last.score > -kInfinity ? last.token : -1;
  }
  group_sync();  // no block may leave while another still writes to its shared memory
}

}  // namespace

int propose(const ProposeParams& params, void* stream) {
  static const cudaError_t prepared = prepare_groups(propose_kernel, sizeof(Shared));
  if (prepared != cudaSuccess) return prepared;
  const GroupLaunch launch(params.batch_size * params.num_rows, params.cluster_size, kThreads, sizeof(Shared), stream);
  return cudaLaunchKernelEx(&launch.config, propose_kernel, params);
}

int max_propose_group() { return max_group_size(propose_kernel, kThreads, sizeof(Shared)); }

}  // namespace fastspec
