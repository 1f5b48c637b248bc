// The draft's own sampling in one launch: for each inner node of a level the law q (written as log-weights) and
// the children drawn from it, in draw order.
//
// A group of blocks (a cluster on sm_90) works on one row, a warp on 128 tokens of it:
//
//   1. statistics   the maximum over the group; or, for laws that cut tokens, one block finds the threshold
//   2. draws        one race per child: each picks the best score after the last one, so the children come as
//                   Gumbel top-k without replacement does, or as the most likely tokens where nothing is drawn

#include "group.cuh"
#include "launch.cuh"
#include "params.h"
#include "philox.cuh"
#include "ptx.cuh"
#include "rows.cuh"
#include "threshold.cuh"

namespace fastspec {
namespace {

constexpr int kPiece = 128;  // tokens of a warp, four per lane
constexpr int kMaxPieces = kMaxVocab / kPiece;
constexpr int kMaxGroup = 16;

// The maximum of a warp's pieces.
struct alignas(8) Maximum {
  float value;
  bool bad;  // the row is no law
};

struct Shared {
  Exchange exchange;
  ThresholdScratch scratch;
  RowStats stats;
  Maximum maxima[kMaxGroup * kWarps];
  Best winners[2][kMaxPieces];
  Penalties penalties;
};

// One row of one sequence; what all threads of the group agree on.
template <LogitType kType>
struct Task {
  Row<kType> row;
  Law law;
  NoiseKey key;
  float* log_weights;  // [V]
  int vocab_size;      // at least that of the row
  int node, depth;
  bool noisy;    // drawn at random rather than by rank
  bool uniform;  // the row is no law: all tokens count alike
};

__device__ __forceinline__ bool is_bad(float4 x) {
  return !(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity);
}

// Four neighbouring logits as the draft's law sees them.
template <LogitType kType>
__device__ __forceinline__ float4 load(const Task<kType>& task, const Penalties& penalties, int first) {
  if (task.uniform) {
    const auto score = [&](int token) { return token < task.vocab_size ? 0.0f : -kInfinity; };
    return {score(first), score(first + 1), score(first + 2), score(first + 3)};
  }
  const float4 x = task.row.load(first, task.row.vectors());
  return penalties.touch(task.depth) ? penalise(x, penalties, first, task.node, task.depth, task.row.vocab_size) : x;
}

// What the children are ranked by: the race w / e, or the logit itself; -inf where a token cannot be proposed.
template <LogitType kType>
__device__ __forceinline__ float4 rank(const Task<kType>& task, const RowStats& stats, float4 x, int first) {
  if (!task.noisy) return x;
  const float scale = task.law.scale;
  const float4 w = {stats.weight(scale, x.x), stats.weight(scale, x.y), stats.weight(scale, x.z),
                    stats.weight(scale, x.w)};
  if (!(w.x + w.y + w.z + w.w > 0)) return {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
  const float4 e = exponentials(task.key, static_cast<uint32_t>(first) / 4);
  const auto race = [](float weight, float noise) { return weight > 0 ? __fdividef(weight, noise) : -kInfinity; };
  return {race(w.x, e.x), race(w.y, e.y), race(w.z, e.z), race(w.w, e.w)};
}

// The law as log-weights; of a greedy law all but `argmax` are gone.
template <LogitType kType>
__device__ __forceinline__ void write_law(const Task<kType>& task, const RowStats& stats, float4 x, int first,
                                          int argmax) {
  constexpr float kLn2 = 0.6931471805599453f;
  const auto value = [&](float logit, int token) {
    if (task.law.greedy) return token == argmax ? 0.0f : -kInfinity;
    const bool kept = stats.weight(task.law.scale, logit) > 0;
    return kept ? (logit - stats.maximum) * task.law.scale * kLn2 : -kInfinity;
  };
  const float4 values = {value(x.x, first), value(x.y, first + 1), value(x.z, first + 2), value(x.w, first + 3)};
  float* target = task.log_weights + first;
  if (first + 4 <= task.vocab_size && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    *reinterpret_cast<float4*>(target) = values;
    return;
  }
  if (first < task.vocab_size) target[0] = values.x;
  if (first + 1 < task.vocab_size) target[1] = values.y;
  if (first + 2 < task.vocab_size) target[2] = values.z;
  if (first + 3 < task.vocab_size) target[3] = values.w;
}

// Pieces of this warp: visit(piece, first token of this lane).
template <typename Visit>
__device__ __forceinline__ void for_each_piece(int num_pieces, Visit visit) {
#pragma unroll 1
  for (int piece = group_rank() + warp_index() * group_size(); piece < num_pieces; piece += kWarps * group_size()) {
    visit(piece, piece * kPiece + lane_index() * 4);
  }
}

// The maximum and validity of the row over the group, or its threshold by the group's first block.
template <LogitType kType>
__device__ __forceinline__ RowStats group_statistics(Shared& shared, const Task<kType>& task, int num_pieces) {
  if (task.law.cuts) {
    if (threadIdx.x == 0) shared.exchange.expect(0, sizeof(RowStats));
    if (group_rank() == 0) {
      const BlockRow<kType, 4> row = {task.row, &shared.penalties, task.node, task.depth};
      const RowStats stats = cut_statistics(row, task.law, shared.scratch);
      if (warp_index() == 0) Broadcast<RowStats>(&shared.stats, shared.exchange, 0).store(0, stats);
    }
    shared.exchange.wait(0);
    return shared.stats;
  }
  const int num_warps = kWarps * group_size();
  if (threadIdx.x == 0) shared.exchange.expect(0, num_warps * static_cast<int>(sizeof(Maximum)));
  float maximum = -kInfinity;
  bool bad = false;
  for_each_piece(num_pieces, [&](int, int first) {
    const float4 x = load(task, shared.penalties, first);
    bad |= is_bad(x);
    maximum = fmaxf(maximum, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  });
  const Maximum mine = {warp_max(maximum), __any_sync(kAllLanes, bad) != 0};
  Broadcast<Maximum>(shared.maxima, shared.exchange, 0).store(group_rank() * kWarps + warp_index(), mine);
  shared.exchange.wait(0);
  maximum = -kInfinity;
  bad = false;
  for (int i = lane_index(); i < num_warps; i += 32) {
    bad |= shared.maxima[i].bad;
    maximum = fmaxf(maximum, shared.maxima[i].value);
  }
  maximum = warp_max(maximum);
  bad = __any_sync(kAllLanes, bad);
  return {maximum, -kInfinity, 0.0f, 0.0f, 0, !bad && maximum > -kInfinity};
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1) propose_kernel(const __grid_constant__ ProposeParams params) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  shared.exchange.arrive();
  const int group = static_cast<int>(blockIdx.x) / group_size();
  const int sequence = group / params.num_rows, row = group % params.num_rows;
  const SamplingParams& sampling = params.sampling;
  const int64_t position = params.positions[sequence];

  if (static_cast<int>(threadIdx.x) < params.num_nodes) {
    const int node = static_cast<int>(threadIdx.x);
    shared.penalties.tokens[node] = static_cast<int>(params.tokens[sequence * params.tokens_stride + node]);
    shared.penalties.parents[node] = params.tree[node].parent;
  }
  if (threadIdx.x == kThreads - 32) {
    const int64_t missing = sampling.min_tokens[sequence] - position;
    shared.penalties.repetition = static_cast<float>(sampling.repetition_penalty[sequence]);
    shared.penalties.shortest = static_cast<int>(max(int64_t{0}, min(missing, int64_t{kMaxNodes})));
    shared.penalties.seen = sampling.seen + static_cast<int64_t>(sequence) * params.vocab_size;
    shared.penalties.eos = sampling.eos_token_ids + sequence * kMaxEos;
  }
  const int node = params.tree[params.first_inner + row].inner_node;
  const TreeNode place = params.tree[node];
  const int64_t source = static_cast<int64_t>(sequence) * params.num_rows + row;
  const int64_t target = static_cast<int64_t>(sequence) * params.num_inner + params.first_inner + row;
  Task<kType> task = {{params.logits, source * params.logits_stride, min(params.draft_vocab_size, params.vocab_size)}};
  task.law = load_law(sampling, sequence, params.vocab_size);
  task.key = params.rule == Rule::kDrafterInvariant
                 ? noise_key(sampling.seed[sequence], position + params.level, Stream::kCoupled, 0)
                 : noise_key(sampling.seed[sequence], position, Stream::kDraft, node);
  task.log_weights = params.draft_logits + target * params.vocab_size;
  task.vocab_size = params.vocab_size;
  task.node = node;
  task.depth = params.level;
  task.noisy = !task.law.greedy && params.rule != Rule::kTargetOnly;
  task.uniform = false;
  shared.exchange.meet();

  const int num_pieces = (params.vocab_size + kPiece - 1) / kPiece;
  RowStats stats = group_statistics(shared, task, num_pieces);
  if (!stats.valid) {
    task.uniform = true;
    stats.maximum = 0;
    stats.threshold = -kInfinity;
    stats.min_weight = 0;
  }

  const bool keeps_scores = num_pieces <= kWarps * group_size();
  float4 scores = {};
  Best last = {kInfinity, -1};
  int64_t* children = params.tokens + sequence * params.tokens_stride + place.first_child;
#pragma unroll 1
  for (int child = 0; child < place.num_children; ++child) {
    const int turn = child + 1;
    Best* winners = shared.winners[turn & 1];
    const Broadcast<Best> out(winners, shared.exchange, turn);
    if (threadIdx.x == 0) shared.exchange.expect(turn, num_pieces * static_cast<int>(sizeof(Best)));
    for_each_piece(num_pieces, [&](int piece, int first) {
      if (child == 0 || !keeps_scores) {
        const float4 x = load(task, shared.penalties, first);
        if (child == 0 && !task.law.greedy) write_law(task, stats, x, first, -1);
        scores = rank(task, stats, x, first);
      }
      const float ranked[4] = {scores.x, scores.y, scores.z, scores.w};
      Best best = {-kInfinity, params.vocab_size};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool drawn = ranked[i] > last.score || (ranked[i] == last.score && first + i <= last.token);
        if (!drawn) best = better(best, {ranked[i], first + i});
      }
      out.store(piece, warp_best(best));
    });
    shared.exchange.wait(turn);
    Best best = {-kInfinity, params.vocab_size};
    for (int piece = lane_index(); piece < num_pieces; piece += 32) best = better(best, winners[piece]);
    last = warp_best(best);
    if (child == 0 && task.law.greedy) {
      for_each_piece(num_pieces, [&](int, int first) { write_law(task, stats, {}, first, last.token); });
    }
    if (group_rank() == 0 && threadIdx.x == 0) children[child] = last.score > -kInfinity ? last.token : -1;
    __syncthreads();  // a turn is over for all warps before the next but one
  }
  // This block has got all that others send to it, so it may leave.
}

}  // namespace

int propose(const ProposeParams& params, void* stream) {
  return for_type(params.logit_type, [&](auto type) -> int {
    const auto kernel = propose_kernel<decltype(type)::value>;
    const cudaError_t prepared = prepare_groups(kernel, sizeof(Shared));  // of this device
    if (prepared != cudaSuccess) return prepared;
    const int groups = params.batch_size * params.num_rows;
    const int size = usable_group(params.cluster_size, (params.vocab_size + kPiece - 1) / kPiece);
    const GroupLaunch launch(groups, size, kThreads, sizeof(Shared), stream);
    return cudaLaunchKernelEx(&launch.config, kernel, params);
  });
}

int max_propose_group() { return max_group_size(propose_kernel<LogitType::kFloat>, kThreads, sizeof(Shared)); }

}  // namespace fastspec
