// Verification in one launch: from the logits of all tree nodes to the accepted path and the next token.
//
// Blocks come in groups (clusters on sm_90). Each sequence has a walker group; where the tree has more rows
// than a group can read at once, helper groups gather the statistics of the rows.
//
//   1. statistics   a warp per tile of a row; or, for laws that cut tokens, a block per row (rows.cuh)
//   2. walk         all blocks of the walker group decide the same path from the same numbers; where a rule
//                   needs a sum or a draw over the vocabulary, the group makes a pass over that one row
//   3. output       one thread writes
//
// Sums are taken over fixed tiles in a fixed order, so results do not depend on the size of the group.

#include "group.cuh"
#include "launch.cuh"
#include "params.h"
#include "philox.cuh"
#include "rows.cuh"

namespace fastspec {
namespace {

constexpr int kPassTile = 4 * kThreads;  // two pairs of neighbouring tokens per thread
constexpr int kMaxPassTiles = kMaxVocab / kPassTile;
constexpr int kMaxRows = 2 * kMaxNodes;

// Masses below this are what rounding leaves of a residual in single precision: the law before it stays.
constexpr double kRounding = 1e-6;

// What a pass finds in a tile: the mass of w, that of q over the tokens not removed, and the winner of the race.
struct Partial {
  float sum;
  float left;
  Best best;
};

// A block's copy of all it knows about its sequence; the blocks of a walker group hold the same values.
struct Shared {
  RowScratch scratch;
  alignas(16) RowStats stats[kMaxRows];  // target rows, then draft rows
  Partial partials[2][kMaxPassTiles];
  TreeNode tree[kMaxNodes];
  int tokens[kMaxNodes];
  int parents[kMaxNodes];
  double p[kMaxNodes];  // target probability of each node's token at its parent
  double q[kMaxNodes];  // draft probability
  double uniform[kMaxNodes];
  double weight[kMaxNodes];  // block verification: r
  bool present[kMaxNodes];
  int removed_token[kMaxNodes];    // rejected siblings at the current node,
  float removed_scale[kMaxNodes];  // and how much of q was taken off them
  Law law;
  int num_removed;
  int parity;
  int sequence;
};

__device__ __forceinline__ Row target_row(const VerifyParams& params, const Shared& shared, int sequence, int node) {
  const SamplingParams& sampling = params.sampling;
  const int64_t element = (static_cast<int64_t>(sequence) * params.num_nodes + node) * params.target_stride;
  const int size = params.logit_type == LogitType::kFloat ? 4 : 2;
  const int64_t length = params.positions[sequence] + params.tree[node].depth;
  return {static_cast<const char*>(params.target_logits) + element * size,
          params.logit_type,
          params.vocab_size,
          {static_cast<float>(sampling.repetition_penalty[sequence]), length < sampling.min_tokens[sequence], node,
           shared.tokens, shared.parents, sampling.seen + static_cast<int64_t>(sequence) * params.vocab_size,
           sampling.eos_token_ids + sequence * kMaxEos}};
}

__device__ __forceinline__ Row draft_row(const VerifyParams& params, int sequence, int inner_row) {
  const int64_t row = static_cast<int64_t>(sequence) * params.num_inner + inner_row;
  return {params.draft_logits + row * params.vocab_size, LogitType::kFloat, params.vocab_size,
          {1.0f, false, 0, nullptr, nullptr, nullptr, nullptr}};
}

// A pass of the group over one row: the mass of w = [a p - c q]+ and either a draw from it or the mass of q that
// is left. Tokens removed before keep the c they had.
__device__ __noinline__ Partial pass(const VerifyParams& params, Shared& shared, int node, float a, float c, bool race,
                                     NoiseKey key) {
  const int sequence = shared.sequence;
  const Row row = target_row(params, shared, sequence, node);
  const RowStats row_stats = shared.stats[node];
  const float scale = shared.law.scale;
  const float p_scale = a / static_cast<float>(row_stats.total);
  const bool subtract = c > 0;
  const float* other = nullptr;
  float other_maximum = 0, q_scale = 0;
  if (subtract) {
    const int inner_row = shared.tree[node].inner_row;
    other = static_cast<const float*>(draft_row(params, sequence, inner_row).logits);
    other_maximum = shared.stats[params.num_nodes + inner_row].maximum;
    q_scale = 1.0f / static_cast<float>(shared.stats[params.num_nodes + inner_row].total);
  }
  const int num_removed = shared.num_removed, parity = shared.parity;
  const int num_tiles = (params.vocab_size + kPassTile - 1) / kPassTile;
#pragma unroll 1
  for (int tile = group_rank(); tile < num_tiles; tile += group_size()) {
    const int first = tile * kPassTile + 4 * static_cast<int>(threadIdx.x);
    const float4 logits = row.load(first, row.aligned());
    float weights[4] = {logits.x, logits.y, logits.z, logits.w};
    float left = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = weight_of(row_stats, scale, weights[i]) * p_scale;
      if (subtract && first + i < params.vocab_size) {
        const float q = exp2_fast((other[first + i] - other_maximum) * kLog2e) * q_scale;
        float taken = c, kept = q;
#pragma unroll 1
        for (int j = 0; j < num_removed; ++j) {
          if (shared.removed_token[j] == first + i) taken = shared.removed_scale[j], kept = 0;
        }
        weights[i] = fmaxf(weights[i] - taken * q, 0.0f);
        left += kept;
      }
    }
    Best best = {-1.0f, params.vocab_size};
    if (race) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        if (weights[i] > 0 || weights[i + 1] > 0) {
          const uint4 words = philox_block(key, static_cast<uint32_t>((first + i) / 2));
          if (weights[i] > 0) best = better(best, {weights[i] / exponential(words.x, words.y), first + i});
          if (weights[i + 1] > 0) best = better(best, {weights[i + 1] / exponential(words.z, words.w), first + i + 1});
        }
      }
      best = block_reduce(best, BestOp(), shared.scratch.bests);
    } else {
      left = block_reduce(left, SumOp(), shared.scratch.floats);
    }
    const float sum =
        block_reduce((weights[0] + weights[1]) + (weights[2] + weights[3]), SumOp(), shared.scratch.floats);
    if (static_cast<int>(threadIdx.x) < group_size()) {
      *in_block(&shared.partials[parity][tile], threadIdx.x) = {sum, left, best};
    }
  }
  group_sync();
  Partial result = {0, 0, {-1.0f, params.vocab_size}};
  for (int tile = threadIdx.x % 32; tile < num_tiles; tile += 32) {
    result.sum += shared.partials[parity][tile].sum;
    result.left += shared.partials[parity][tile].left;
    result.best = better(result.best, shared.partials[parity][tile].best);
  }
  // The next pass writes the other half; this one is free again when all blocks have met after that.
  if (threadIdx.x == 0) shared.parity = parity ^ 1;
  __syncthreads();
  return {warp_reduce(result.sum, SumOp()), warp_reduce(result.left, SumOp()), warp_reduce(result.best, BestOp())};
}

// Where the path stops and the token after it, -1 if the node has no law.
struct Decision {
  int stop, next;
};

__device__ __forceinline__ NoiseKey key_of(const VerifyParams& params, const Shared& shared, Stream stream, int node) {
  return noise_key(params.sampling.seed[shared.sequence], params.positions[shared.sequence], stream, node);
}

// A draw from [a p - c q]+ at a node; from p where rounding left nothing of it.
__device__ __forceinline__ int draw(const VerifyParams& params, Shared& shared, int node, float a, float c) {
  const NoiseKey key = key_of(params, shared, Stream::kEmit, node);
  for (;;) {
    const Partial found = pass(params, shared, node, a, c, true, key);
    if (found.sum > kRounding || c == 0) return found.best.token;
    a = 1, c = 0;
  }
}

// Temperature 0, target-only and drafter-invariant: one token per row, followed while it is a child.
__device__ __forceinline__ Decision match(const VerifyParams& params, Shared& shared) {
  for (int node = 0;;) {
    if (!shared.stats[node].valid) return {node, -1};
    int next;
    if (shared.law.greedy) {
      next = shared.stats[node].argmax;
    } else {
      NoiseKey key = key_of(params, shared, Stream::kTarget, node);
      if (params.rule == Rule::kDrafterInvariant) {
        key = key_of(params, shared, Stream::kCoupled, 0);
        key.position += shared.tree[node].depth;
      }
      next = pass(params, shared, node, 1.0f, 0.0f, true, key).best.token;
    }
    const int first = shared.tree[node].first_child, end = first + shared.tree[node].num_children;
    int child = first;
    while (child < end && shared.tokens[child] != next) ++child;
    if (child == end) return {node, next};
    node = child;
  }
}

// Chain, block verification (Sun et al. 2403.10444): the last i whose test u_i <= h_i succeeds.
__device__ __forceinline__ Decision block_verification(const VerifyParams& params, Shared& shared) {
  if (threadIdx.x == 0) {
    shared.weight[0] = 1;
    for (int node = 1; node < params.num_nodes && shared.present[node]; ++node) {
      const double carried = shared.weight[node - 1] * shared.p[node];
      shared.weight[node] = shared.q[node] > 0 ? fmin(1.0, carried / shared.q[node]) : (carried > 0 ? 1.0 : 0.0);
    }
  }
  __syncthreads();
  int last = 0;
  while (last + 1 < params.num_nodes && shared.present[last + 1]) ++last;
  if (last == 0 || shared.uniform[last] <= shared.weight[last]) {
    return {last, shared.stats[last].valid ? draw(params, shared, last, 1.0f, 0.0f) : -1};
  }
  for (int node = last - 1; node > 0; --node) {
    const double r = shared.weight[node];
    if (shared.uniform[node] > r) continue;  // h <= r: most tests fail without their sum over the vocabulary
    const Partial rest =
        pass(params, shared, node, static_cast<float>(r), 1.0f, true, key_of(params, shared, Stream::kEmit, node));
    const double denominator = rest.sum + 1 - r;
    const double h = denominator > 0 ? rest.sum / denominator : 1.0;
    if (shared.uniform[node] <= h) {
      return {node, rest.sum > kRounding ? rest.best.token : draw(params, shared, node, 1.0f, 0.0f)};
    }
  }
  return {0, draw(params, shared, 0, 1.0f, 1.0f)};
}

// Undoes the last subtraction for the token rejected last.
__device__ __forceinline__ void restore_removed(Shared& shared, int num_removed, double c) {
  __syncthreads();
  if (threadIdx.x == 0 && num_removed > 0) {
    float& scale = shared.removed_scale[num_removed - 1];
    scale = fminf(scale, static_cast<float>(c));
  }
  __syncthreads();
}

// Top-down tests of siblings drawn without replacement (RSD 2402.14160); a chain has one child each.
//
// After some rejections the target's law at the node is [p - c q]+ / mass for one scalar c, but for the rejected
// tokens, whose q is gone and whose c stands still.
__device__ __forceinline__ Decision recursive_rejection(const VerifyParams& params, Shared& shared) {
  for (int node = 0;;) {
    if (!shared.stats[node].valid) return {node, -1};
    const int first = shared.tree[node].first_child, end = first + shared.tree[node].num_children;
    double mass = 1, left = 1, c = 0, previous = 0;
    int accepted = -1, num_removed = 0, last = end - 1;
    while (last >= first && !shared.present[last]) --last;
    for (int child = first; child <= last; ++child) {
      if (!shared.present[child]) continue;
      const int token = shared.tokens[child];
      double q = shared.q[child], taken = c;
      for (int j = 0; j < num_removed; ++j) {
        if (shared.removed_token[j] == token) taken = shared.removed_scale[j], q = 0;
      }
      const double p = fmax(shared.p[child] - taken * shared.q[child], 0.0) / mass;
      const double ratio = q > 0 && left > 0 ? p * left / q : (p > 0 ? 1.0 : 0.0);
      if (shared.uniform[child] <= fmin(ratio, 1.0)) {
        accepted = child;
        break;
      }
      previous = c;
      if (left > 0) c += mass / left;
      __syncthreads();
      if (threadIdx.x == 0) {
        shared.removed_token[num_removed] = token;
        shared.removed_scale[num_removed] = static_cast<float>(q > 0 ? c : taken);
        shared.num_removed = num_removed + 1;
      }
      ++num_removed;
      __syncthreads();
      if (child == last || c == previous) continue;  // only a later test needs the masses
      // What is left of q is summed anew: 1 - q has no digits where a draft was sure of what it drew first.
      const Partial rest = pass(params, shared, node, 1.0f, static_cast<float>(c), false, {});
      left = rest.left;
      if (rest.sum > kRounding) {
        mass = rest.sum;
      } else {
        c = previous;
        restore_removed(shared, num_removed, c);
      }
    }
    if (accepted < 0) {
      const NoiseKey key = key_of(params, shared, Stream::kEmit, node);
      Partial found = pass(params, shared, node, 1.0f, static_cast<float>(c), true, key);
      if (c > 0 && !(found.sum > kRounding)) {
        restore_removed(shared, num_removed, previous);
        found = pass(params, shared, node, 1.0f, static_cast<float>(previous), true, key);
      }
      return {node, found.best.token};
    }
    node = accepted;
    __syncthreads();
    if (threadIdx.x == 0) shared.num_removed = 0;
    __syncthreads();
  }
}

__device__ __forceinline__ void load_sequence(const VerifyParams& params, Shared& shared, int sequence) {
  __syncthreads();
  for (int node = threadIdx.x; node < params.num_nodes; node += kThreads) {
    shared.tree[node] = params.tree[node];
    shared.parents[node] = params.tree[node].parent;
    shared.tokens[node] = static_cast<int>(params.tokens[sequence * params.tokens_stride + node]);
  }
  if (threadIdx.x == 0) {
    shared.law = load_law(params.sampling, sequence, params.vocab_size);
    shared.num_removed = 0;
    shared.parity = 0;
    shared.sequence = sequence;
  }
  __syncthreads();
}

// What each node's test needs, once the statistics are known.
__device__ __forceinline__ void load_tests(const VerifyParams& params, Shared& shared) {
  for (int node = threadIdx.x; node < params.num_nodes; node += kThreads) {
    shared.present[node] = false;
    const int token = shared.tokens[node];
    if (node == 0 || token < 0 || token >= params.vocab_size) continue;
    const int parent = shared.parents[node], inner_row = shared.tree[parent].inner_row;
    const RowStats& row = shared.stats[parent];
    const RowStats& other = shared.stats[params.num_nodes + inner_row];
    const float logit = target_row(params, shared, shared.sequence, parent)[token];
    const float draft_logit = draft_row(params, shared.sequence, inner_row)[token];
    shared.present[node] = row.valid && other.valid;
    shared.p[node] = weight_of(row, shared.law.scale, logit) / row.total;
    shared.q[node] = exp2_fast((draft_logit - other.maximum) * kLog2e) / other.total;
    shared.uniform[node] = accept_uniform(key_of(params, shared, Stream::kAccept, node));
  }
  __syncthreads();
}

__device__ __forceinline__ void write(const VerifyParams& params, const Shared& shared, Decision decision) {
  const bool invalid = !shared.stats[decision.stop].valid;
  const int depth = shared.tree[decision.stop].depth;
  int64_t* path = params.path + static_cast<int64_t>(shared.sequence) * (params.max_depth + 1);
  for (int place = params.max_depth; place > depth; --place) path[place] = decision.stop;
  for (int node = decision.stop, place = depth; place >= 0; --place, node = shared.parents[node]) path[place] = node;
  params.num_accepted[shared.sequence] = depth;
  params.next_token[shared.sequence] = invalid ? -1 : decision.next;
  params.invalid[shared.sequence] = invalid;
}

// Statistics of rows of one sequence: those that fall to worker `worker` of `num_workers` blocks.
__device__ __forceinline__ void gather_statistics(const VerifyParams& params, Shared& shared, int num_rows,
                                                  int worker, int num_workers) {
  const int sequence = shared.sequence;
  const Law law = shared.law;
  const int64_t first_row = static_cast<int64_t>(sequence) * (params.num_nodes + params.num_inner);
  const int num_tiles = (params.vocab_size + kStatsTile - 1) / kStatsTile;
  const bool by_row = law.cuts() && !law.greedy;
  if (by_row) {
#pragma unroll 1
    for (int row = worker; row < params.num_nodes; row += num_workers) {
      const RowStats stats = row_statistics(target_row(params, shared, sequence, row), law, shared.scratch);
      if (threadIdx.x == 0) params.stats[first_row + row] = stats;
    }
  }
  const int start = by_row ? params.num_nodes : 0;
  const int total = (num_rows - start) * num_tiles;
#pragma unroll 1
  for (int task = worker * kWarps + threadIdx.x / 32; task < total; task += num_workers * kWarps) {
    const int row = start + task / num_tiles, tile = task % num_tiles;
    const bool target = row < params.num_nodes;
    const TileStats stats = tile_statistics(target ? target_row(params, shared, sequence, row)
                                                   : draft_row(params, sequence, row - params.num_nodes),
                                            target ? law : plain_law(), tile);
    if (threadIdx.x % 32 == 0) {
      *reinterpret_cast<float4*>(&params.tiles[(first_row + row) * num_tiles + tile]) =
          *reinterpret_cast<const float4*>(&stats);
    }
  }
}

// Statistics of all rows into the block's memory.
__device__ __forceinline__ void collect_statistics(const VerifyParams& params, Shared& shared, int num_rows) {
  const Law law = shared.law;
  const int64_t first_row = static_cast<int64_t>(shared.sequence) * (params.num_nodes + params.num_inner);
  const int num_tiles = (params.vocab_size + kStatsTile - 1) / kStatsTile;
  const bool by_row = law.cuts() && !law.greedy;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < num_rows; row += kWarps) {
    if (by_row && row < params.num_nodes) {
      const int4* source = reinterpret_cast<const int4*>(&params.stats[first_row + row]);
      if (threadIdx.x % 32 < 2) {
        reinterpret_cast<int4*>(&shared.stats[row])[threadIdx.x % 32] = __ldcg(source + threadIdx.x % 32);
      }
    } else {
      const RowStats stats = merge_tiles(params.tiles + (first_row + row) * num_tiles, num_tiles,
                                         row < params.num_nodes ? law : plain_law(), params.vocab_size);
      if (threadIdx.x % 32 == 0) shared.stats[row] = stats;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int num_rows = params.num_nodes + (params.draft_logits != nullptr ? params.num_inner : 0);
  const int helper_blocks = params.helper_clusters * group_size();
  const int block = static_cast<int>(blockIdx.x);
  if (params.last_stage == Stage::kLaunch) return;

  if (block < helper_blocks) {
    // Helpers come first in the grid and wait for nobody, so walkers that wait for them cannot starve them.
#pragma unroll 1
    for (int sequence = 0; sequence < params.batch_size; ++sequence) {
      load_sequence(params, shared, sequence);
      gather_statistics(params, shared, num_rows, block, helper_blocks);
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&params.arrivals[sequence], 1);
      }
    }
    return;
  }
  load_sequence(params, shared, (block - helper_blocks) / group_size());
  if (helper_blocks == 0) {
    gather_statistics(params, shared, num_rows, group_rank(), group_size());
  } else if (group_rank() == 0 && threadIdx.x == 0) {
    int* arrivals = &params.arrivals[shared.sequence];
    while (atomicAdd(arrivals, 0) < helper_blocks) __nanosleep(20);
    *arrivals = 0;  // for the next launch
    __threadfence();
  }
  if (params.last_stage == Stage::kStatistics) return;
  group_sync();
  collect_statistics(params, shared, num_rows);
  if (params.last_stage == Stage::kCollected) return;

  Decision decision;
  if (shared.law.greedy || params.draft_logits == nullptr) {
    decision = match(params, shared);
  } else {
    load_tests(params, shared);
    decision = params.rule == Rule::kBlock ? block_verification(params, shared) : recursive_rejection(params, shared);
  }
  if (group_rank() == 0 && threadIdx.x == 0) write(params, shared, decision);
  group_sync();  // no block may leave while another still writes to its shared memory
}

}  // namespace

int verify(const VerifyParams& params, void* stream) {
  static_assert(sizeof(RowStats) == 32 && sizeof(TreeNode) == 32 && sizeof(TileStats) == 16);
  static const cudaError_t prepared = prepare_groups(verify_kernel, sizeof(Shared));
  if (prepared != cudaSuccess) return prepared;
  const GroupLaunch launch(params.helper_clusters + params.batch_size, params.cluster_size, kThreads, sizeof(Shared), stream);
  return cudaLaunchKernelEx(&launch.config, verify_kernel, params);
}

int max_verify_group() { return max_group_size(verify_kernel, kThreads, sizeof(Shared)); }

}  // namespace fastspec
