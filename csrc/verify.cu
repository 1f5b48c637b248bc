// Verification in one launch: from the logits of all tree nodes to the accepted path and the next token.
//
// A group of blocks (a cluster on sm_90) works on one sequence. The vocabulary is cut into tiles of 512 tokens; a tile
// belongs to one block, whatever the row, so that a row read twice comes from the nearest cache.
//
//   1. read         every warp takes the statistics of its tiles of the first rows of the tree and writes them into the
//                   shared memory of all blocks; for laws that cut tokens a block takes a row (threshold.cuh)
//   2. statistics   one group barrier; each block merges the tiles, and each node's thread prepares its test
//   3. walk         the first warp of every block decides the same path from the same numbers. Where a rule needs a sum
//                   or a draw over the vocabulary the group makes a pass over that row: a warp per quarter tile, one
//                   barrier. Where the path leaves the rows that are known, the next ones are read as in 1.
//   4. output       one block writes
//
// Sums are taken over fixed tiles in a fixed order, so results do not depend on the size of the group.

#include "group.cuh"
#include "launch.cuh"
#include "params.h"
#include "philox.cuh"
#include "rows.cuh"
#include "threshold.cuh"

namespace fastspec {
namespace {

constexpr int kMaxRows = 2 * kMaxNodes;
constexpr int kQuarter = kTile / 4;  // tokens of a pass, four per lane

// Masses below this are what rounding leaves of a residual in single precision: the law before it stays.
constexpr float kRounding = 1e-6f;
// Stands for the infinite ratio p / q where q = 0: products with r stay numbers.
constexpr float kHugeRatio = 1e30f;

// What a pass finds in a quarter of a tile: the mass of w, that of q over the tokens not removed, and the winner of
// the race.
struct alignas(16) Partial {
  float sum;
  float left;
  Best best;
};

// What a pass over the row of a node shall find: the mass of w = [a p - c q]+, and a draw from it if there is a race.
struct Request {
  int node;
  float a, c;
  int num_removed;  // tokens removed before keep the c they had
  bool race;
  Stream stream;
};

// Where the path stops and the token after it, -1 if the node has no law.
struct Decision {
  int stop, next;
};

// What the walk needs before it can go on.
enum class Need { kRead, kPass, kNothing };
enum class Phase { kArrive, kTest, kRest, kDraw, kLastDraw };

// Where the walk over the tree stands.
struct WalkState {
  Need need;
  Request request;
  Decision decision;
  Phase phase;
  int node;  // where the path has come to, and what to read
  int limit, length;  // block verification: nodes still to be tested, nodes drafted
  int child, num_removed;  // recursive rejection: the sibling to be tested, rejected ones before it,
  float mass, left;  // what is left of p and of q,
  float c, previous;  // and how much of q was taken off p
};

// A node's test: probabilities of its token at its parent, and its uniform.
struct alignas(16) Test {
  float p, q, uniform;
  int token;  // -1: nothing was drafted, or the parent has no law
};

enum class Known : int { kNo, kYes, kInvalid };  // of a node's row

// A block's copy of all it knows about its sequence; the blocks of a group hold the same values.
struct Shared {
  Exchange exchange;
  ThresholdScratch scratch;
  RowStats stats[kMaxRows];  // target rows, then draft rows
  TreeNode tree[kMaxNodes];
  Penalties penalties;  // and with them the tokens and parents of the tree
  Test tests[kMaxNodes];
  Known known[kMaxNodes];
  int next[kMaxNodes];  // greedy: the child that the argmax leads to; kMaxNodes if none
  int removed_token[kMaxNodes];  // rejected siblings at the current node,
  float removed_scale[kMaxNodes];  // and how much of q was taken off them
  WalkState walk;
  Law law;
  int64_t seed;
  int64_t position;
};

__host__ __device__ constexpr int num_tiles(int vocab_size) { return (vocab_size + kTile - 1) / kTile; }
__host__ __device__ constexpr int tile_bytes(int vocab_size) {
  return 2 * kMaxRowsAtOnce * num_tiles(vocab_size) * static_cast<int>(sizeof(TileStats));
}

// What all functions below share.
template <LogitType kType>
struct Context {
  const VerifyParams& params;
  Shared& shared;
  TileStats* tiles;  // [2, kMaxRowsAtOnce, num_tiles] in shared memory
  Partial* partials;  // [2, 4 * num_tiles] likewise
  int sequence;
  int num_tiles;

  __device__ __forceinline__ Row<kType> target_row(int node) const {
    return {params.target_logits, (static_cast<int64_t>(sequence) * params.num_nodes + node) * params.target_stride,
            params.vocab_size};
  }
  __device__ __forceinline__ DraftRow draft_row(int inner_row) const {
    return {params.draft_logits, (static_cast<int64_t>(sequence) * params.num_inner + inner_row) * params.vocab_size,
            params.vocab_size};
  }
  __device__ __forceinline__ NoiseKey key(Stream stream, int node) const {
    return noise_key(shared.seed, shared.position, stream, node);
  }
  __device__ __forceinline__ void note(Mark mark) const {
    if (params.clock != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
      params.clock[static_cast<int>(mark)] = clock64();
    }
  }
};

// The walk over the tree, by the first warp of a block. It stops wherever it needs the whole group, and is called again
// with what the group found; `phase` says where it stopped.
class Walk {
 public:
  __device__ __forceinline__ Walk(const VerifyParams& params, Shared& shared)
      : params_(params), shared_(shared), at_(shared.walk) {}

  __device__ __forceinline__ void start() {
    at_ = {};
    at_.limit = params_.num_nodes - 1;
    at_.length = -1;
  }

  __device__ __forceinline__ void resume(const Partial& found) {
    if (shared_.law.greedy || params_.draft_logits == nullptr) {
      if (lane_index() == 0) match(found);
    } else if (params_.rule == Rule::kBlock) {
      block_verification(found);
    } else {
      if (lane_index() == 0) recursive_rejection(found);
    }
  }

 private:
  __device__ __forceinline__ void read(int node) { at_.need = Need::kRead, at_.node = node; }
  __device__ __forceinline__ void pass(Phase next, const Request& request) {
    at_.need = Need::kPass, at_.phase = next, at_.request = request;
  }
  __device__ __forceinline__ void finish(int stop, int next) { at_.need = Need::kNothing, at_.decision = {stop, next}; }

  // Temperature 0, target-only and drafter-invariant: one token per row, followed while it is a child.
  __device__ __forceinline__ void match(const Partial& found) {
    int node = at_.node;
    if (at_.phase == Phase::kDraw) {
      const int first = shared_.tree[node].first_child, end = first + shared_.tree[node].num_children;
      int child = first;
      while (child < end && shared_.penalties.tokens[child] != found.best.token) ++child;
      if (child == end) return finish(node, found.best.token);
      node = child;
      at_.phase = Phase::kArrive;
    }
    for (;;) {
      const Known known = shared_.known[node];
      const int next = shared_.next[node];
      if (known == Known::kNo) return read(node);
      if (known == Known::kInvalid) return finish(node, -1);
      if (!shared_.law.greedy) {
        at_.node = node;
        const bool coupled = params_.rule == Rule::kDrafterInvariant;
        return pass(Phase::kDraw, {node, 1.0f, 0.0f, 0, true, coupled ? Stream::kCoupled : Stream::kTarget});
      }
      if (next == kMaxNodes) return finish(node, shared_.stats[node].argmax);
      node = next;
    }
  }

  // Block verification: the last node up to `limit` whose test may succeed, its r, and the last that was drafted.
  struct Candidate {
    int stop;
    float r;
    int end;
    bool known;  // whether the rows up to `end` are
  };

  // r_i = min(1, r_{i-1} p_i / q_i) for all nodes of a chain: functions min(bound, factor * r) composed by a scan.
  __device__ __forceinline__ Candidate candidate(int limit) const {
    Candidate found = {0, 1.0f, 0, true};
    float carried = 1;
#pragma unroll 1
    for (int base = 0; base < limit; base += 32) {
      const int node = base + lane_index() + 1;
      const bool inside = node <= limit;
      const Known known = inside ? shared_.known[node - 1] : Known::kYes;
      const Test test = shared_.tests[inside ? node : 0];
      const bool drafted = inside && known != Known::kNo && test.token >= 0;
      float bound = 1;
      float factor = test.q > 0 ? fminf(test.p / test.q, kHugeRatio) : (test.p > 0 ? kHugeRatio : 0.0f);
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const float before = __shfl_up_sync(kAllLanes, bound, offset);
        const float factors = __shfl_up_sync(kAllLanes, factor, offset);
        if (lane_index() >= offset) {
          bound = fminf(bound, factor * before);
          factor = fminf(factor * factors, kHugeRatio);
        }
      }
      const float r = fminf(bound, factor * carried);
      // Drafted nodes up to the first gap.
      const uint32_t gaps = __ballot_sync(kAllLanes, !drafted);
      const int length = gaps == 0 ? 32 : __ffs(static_cast<int>(gaps)) - 1;
      const bool passes = lane_index() < length && test.uniform <= r;
      const uint32_t passing = __ballot_sync(kAllLanes, passes);
      if (passing != 0) {
        const int lane = 31 - __clz(static_cast<int>(passing));
        found.stop = base + lane + 1;
        found.r = __shfl_sync(kAllLanes, r, lane);
      }
      found.end = base + length;
      if (length < 32) {
        found.known = __shfl_sync(kAllLanes, static_cast<int>(known), length) != static_cast<int>(Known::kNo);
        break;
      }
      carried = __shfl_sync(kAllLanes, r, 31);
    }
    return found;
  }

  // Chain, block verification (Sun et al. 2403.10444): the last i whose test u_i <= h_i succeeds. All lanes decide the
  // same; the first one writes.
  __device__ __forceinline__ void block_verification(const Partial& found) {
    const Phase phase = at_.phase;
    const Request request = at_.request;
    int limit = at_.limit, length = at_.length;
    __syncwarp();
    const bool writes = lane_index() == 0;
    const auto draw_from = [&](Phase next, int node, float a, float c) {
      if (writes) pass(next, {node, a, c, 0, true, Stream::kEmit});
    };

    const int stop = request.node;
    bool done = phase == Phase::kLastDraw || phase == Phase::kDraw;
    if (phase == Phase::kTest) {
      const float denominator = found.sum + (1 - request.a);
      const float h = denominator > 0 ? found.sum / denominator : 1.0f;
      done = shared_.tests[stop].uniform <= h;
      limit = stop - 1;
    }
    if (done) {
      if (phase != Phase::kLastDraw && !(found.sum > kRounding)) return draw_from(Phase::kLastDraw, stop, 1.0f, 0.0f);
      if (writes) finish(stop, found.best.token);
      return;
    }
    // h <= r: most tests fail without their sum over the vocabulary.
    const Candidate last = candidate(limit);
    if (writes) at_.phase = Phase::kArrive, at_.limit = limit;
    if (!last.known) {
      if (writes) read(last.end);
      return;
    }
    if (length < 0) length = last.end;
    if (writes) at_.length = length;
    if (last.stop == length) {
      const Known known = shared_.known[length];
      if (known == Known::kYes) return draw_from(Phase::kLastDraw, length, 1.0f, 0.0f);
      if (writes) known == Known::kNo ? read(length) : finish(length, -1);
      return;
    }
    draw_from(last.stop > 0 ? Phase::kTest : Phase::kDraw, last.stop, last.r, 1.0f);
  }

  // Top-down tests of siblings drawn without replacement (RSD 2402.14160); a chain has one child each.
  //
  // After some rejections the target's law at the node is [p - c q]+ / mass for one scalar c, but for the rejected
  // tokens, whose q is gone and whose c stands still.
  __device__ __forceinline__ void recursive_rejection(const Partial& found) {
    int node = at_.node;
    if (at_.phase == Phase::kLastDraw) return finish(node, found.best.token);
    if (at_.phase == Phase::kDraw) {
      if (!(at_.c > 0) || found.sum > kRounding) return finish(node, found.best.token);
      restore(at_.previous);
      return pass(Phase::kLastDraw, {node, 1.0f, at_.previous, at_.num_removed, true, Stream::kEmit});
    }
    if (at_.phase == Phase::kRest) {
      // What is left of q is summed anew: 1 - q has no digits where a draft was sure of what it drew first.
      at_.left = found.left;
      if (found.sum > kRounding) {
        at_.mass = found.sum;
      } else {
        at_.c = at_.previous;
        restore(at_.c);
      }
      ++at_.child;
    }
    for (;;) {
      const int first = shared_.tree[node].first_child;
      int last = first + shared_.tree[node].num_children - 1;
      if (at_.phase == Phase::kArrive) {
        const Known known = shared_.known[node];
        if (known == Known::kNo) return read(node);
        if (known == Known::kInvalid) return finish(node, -1);
        at_.child = first;
        at_.mass = at_.left = 1, at_.c = at_.previous = 0, at_.num_removed = 0;
        at_.phase = Phase::kTest;
      }
      while (last >= at_.child && shared_.tests[last].token < 0) --last;
      for (; at_.child <= last; ++at_.child) {
        const Test test = shared_.tests[at_.child];
        if (test.token < 0) continue;
        if (accepts(test)) break;
        if (at_.child < last && at_.c != at_.previous) {  // only a later test needs the masses
          at_.node = node;
          return pass(Phase::kRest, {node, 1.0f, at_.c, at_.num_removed, false, Stream::kEmit});
        }
      }
      if (at_.child > last) {
        at_.node = node;
        return pass(Phase::kDraw, {node, 1.0f, at_.c, at_.num_removed, true, Stream::kEmit});
      }
      node = at_.child;
      at_.phase = Phase::kArrive;
    }
  }

  // Accepts with probability min(1, (p / mass) / (q / left)), or removes the token.
  __device__ __forceinline__ bool accepts(const Test& test) {
    float q = test.q, taken = at_.c;
    for (int j = 0; j < at_.num_removed; ++j) {
      if (shared_.removed_token[j] == test.token) taken = shared_.removed_scale[j], q = 0;
    }
    const float p = fmaxf(test.p - taken * test.q, 0.0f);
    if (q > 0 && at_.left > 0 ? test.uniform * q * at_.mass <= p * at_.left : p > 0) return true;
    at_.previous = at_.c;
    if (at_.left > 0) at_.c += at_.mass / at_.left;
    shared_.removed_token[at_.num_removed] = test.token;
    shared_.removed_scale[at_.num_removed] = q > 0 ? at_.c : taken;
    ++at_.num_removed;
    return false;
  }

  // Undoes the last subtraction for the token rejected last.
  __device__ __forceinline__ void restore(float scale) {
    if (at_.num_removed == 0) return;
    float& removed = shared_.removed_scale[at_.num_removed - 1];
    removed = fminf(removed, scale);
  }

  const VerifyParams& params_;
  Shared& shared_;
  WalkState& at_;
};

template <LogitType kType>
__device__ __forceinline__ void load_sequence(const Context<kType>& context) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const int node = static_cast<int>(threadIdx.x), sequence = context.sequence;
  if (node < params.num_nodes) {
    const TreeNode place = params.tree[node];
    shared.penalties.tokens[node] = static_cast<int>(params.tokens[sequence * params.tokens_stride + node]);
    shared.tree[node] = place;
    shared.penalties.parents[node] = place.parent;
    shared.known[node] = Known::kNo;
    shared.next[node] = kMaxNodes;
    shared.tests[node] = {0, 0, 0, -1};
  }
  if (threadIdx.x == kThreads - 96) Walk(params, shared).start();
  if (threadIdx.x == kThreads - 32) shared.law = load_law(params.sampling, sequence, params.vocab_size);
  if (threadIdx.x == kThreads - 64) {
    const int64_t position = params.positions[sequence];
    const int64_t missing = params.sampling.min_tokens[sequence] - position;
    shared.penalties.repetition = static_cast<float>(params.sampling.repetition_penalty[sequence]);
    shared.penalties.shortest = static_cast<int>(max(int64_t{0}, min(missing, int64_t{kMaxNodes})));
    shared.penalties.seen = params.sampling.seen + static_cast<int64_t>(sequence) * params.vocab_size;
    shared.penalties.eos = params.sampling.eos_token_ids + sequence * kMaxEos;
    shared.seed = params.sampling.seed[sequence];
    shared.position = position;
  }
}

// Rows that are read together: those of a node and of some of its descendants.
struct Span {
  int node;
  int first_child, num_ahead;
  int inner_row, first_inner, num_inner;

  // The root and what follows it in breadth-first order.
  __device__ __forceinline__ explicit Span(const VerifyParams& params)
      : node(0),
        first_child(1),
        num_ahead(params.root_ahead),
        inner_row(params.num_nodes > 1 ? 0 : -1),
        first_inner(1),
        num_inner(params.root_inner_ahead) {}
  __device__ __forceinline__ Span(int node, const TreeNode& place)
      : node(node),
        first_child(place.first_child),
        num_ahead(place.num_ahead),
        inner_row(place.inner_row),
        first_inner(place.first_inner_ahead),
        num_inner(place.num_inner_ahead) {}

  __device__ __forceinline__ int num_targets() const { return 1 + num_ahead; }
  __device__ __forceinline__ int num_drafts() const { return inner_row < 0 ? 0 : 1 + num_inner; }
  __device__ __forceinline__ int target(int row) const { return row == 0 ? node : first_child + row - 1; }
  __device__ __forceinline__ int draft(int row) const { return row == 0 ? inner_row : first_inner + row - 1; }
  __device__ __forceinline__ bool holds(int other) const {
    return other == node || (other >= first_child && other < first_child + num_ahead);
  }
};

// The tiles of this block in some rows, one after the other, dealt to the warps in turn.
struct Items {
  int row, local, local_tiles;
  int row_step, local_step;

  __device__ __forceinline__ explicit Items(int num_tiles)
      : local_tiles((num_tiles - group_rank() + group_size() - 1) / group_size()) {
    // A block without tiles, of a small vocabulary, has no items at all.
    const int divisor = max(local_tiles, 1);
    row = local_tiles > 0 ? warp_index() / divisor : INT32_MAX / 2, local = warp_index() % divisor;
    row_step = kWarps / divisor, local_step = kWarps % divisor;
  }
  __device__ __forceinline__ int tile() const { return group_rank() + local * group_size(); }
  __device__ __forceinline__ void advance() {
    row += row_step, local += local_step;
    if (local >= local_tiles) local -= local_tiles, ++row;
  }
};

template <LogitType kType>
__device__ __forceinline__ void load_tile(const Row<kType>& row, int tile, float4 (&x)[kVectors]) {
  const bool vector = row.vectors();
#pragma unroll
  for (int j = 0; j < kVectors; ++j) x[j] = row.load(lane_token(tile, j), vector);
}

// Statistics of the rows of a span, and the tests of the children of its nodes.
template <LogitType kType>
__device__ __forceinline__ void read(const Context<kType>& context, const Span& span, int turn) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const bool first = turn == 0;
  const int num_targets = span.num_targets();
  TileStats* tiles = context.tiles + (turn & 1) * kMaxRowsAtOnce * context.num_tiles;
  Items items(context.num_tiles);
  float4 x[kVectors];
  // Under way before the law is known, which may make it needless.
  if (items.row < num_targets) load_tile(context.target_row(span.target(items.row)), items.tile(), x);
  if (first) {
    load_sequence(context);
    shared.exchange.meet();
  }
  const Broadcast<TileStats> out(tiles, shared.exchange, turn);
  const Law& law = shared.law;
  const bool greedy = law.greedy, cuts = law.cuts(), with_draft = params.draft_logits != nullptr && !greedy;
  const int num_drafts = with_draft ? span.num_drafts() : 0, num_rows = num_targets + num_drafts;
  const float scale = law.scale;
  if (threadIdx.x == 0) {
    const int tile_rows = cuts ? num_drafts : num_rows;
    shared.exchange.expect(turn, tile_rows * context.num_tiles * static_cast<int>(sizeof(TileStats)) +
                                     (num_rows - tile_rows) * static_cast<int>(sizeof(RowStats)));
  }

  // What the test of a node reads, if this span holds its parent. The last threads have the fewest items.
  const int node = kThreads - 1 - static_cast<int>(threadIdx.x);
  Test test = {0, 0, 0, -1};
  float target_logit = 0, draft_logit = 0;
  int parent = 0;
  bool tested = node > 0 && node < params.num_nodes;
  if (tested) {
    parent = shared.penalties.parents[node];
    test.token = shared.penalties.tokens[node];
    tested = span.holds(parent) && test.token >= 0 && test.token < params.vocab_size;
  }
  if (tested && with_draft) {
    target_logit = context.target_row(parent)[test.token];
    draft_logit = context.draft_row(shared.tree[parent].inner_row)[test.token];
    test.uniform = accept_uniform(context.key(Stream::kAccept, node));
  }

  if (!cuts) {
    for (bool loaded = true; items.row < num_targets; items.advance(), loaded = false) {
      const int tile = items.tile(), place = span.target(items.row), depth = shared.tree[place].depth;
      if (!loaded) load_tile(context.target_row(place), tile, x);
      if (shared.penalties.touch(depth)) {
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          x[j] = penalise(x[j], shared.penalties, lane_token(tile, j), place, depth, params.vocab_size);
        }
      }
      out.store(items.row * context.num_tiles + tile, greedy ? greedy_statistics(x, tile) : tile_statistics(x, scale));
    }
  } else {
    while (items.row < num_targets) items.advance();
  }
#pragma unroll 1
  for (; items.row < num_rows; items.advance()) {
    const int tile = items.tile();
    load_tile(context.draft_row(span.draft(items.row - num_targets)), tile, x);
    out.store(items.row * context.num_tiles + tile, tile_statistics(x, kLog2e));
  }
  if (cuts) {
#pragma unroll 1
    for (int row = group_rank(); row < num_targets; row += group_size()) {
      const int place = span.target(row);
      const BlockRow<kType> logits = {context.target_row(place), &shared.penalties, place, shared.tree[place].depth};
      const RowStats stats = cut_statistics(logits, law, shared.scratch);
      if (warp_index() == 0) Broadcast<RowStats>(shared.stats, shared.exchange, turn).store(place, stats);
      __syncthreads();
    }
  }
  if (first) context.note(Mark::kRead);
  shared.exchange.wait(turn);

#pragma unroll 1
  for (int row = warp_index() + (cuts ? num_targets : 0); row < num_rows; row += kWarps) {
    const bool is_target = row < num_targets;
    const RowStats stats =
        merge_tiles(tiles + row * context.num_tiles, context.num_tiles, is_target ? scale : kLog2e, greedy);
    if (lane_index() == 0) {
      shared.stats[is_target ? span.target(row) : params.num_nodes + span.draft(row - num_targets)] = stats;
    }
  }
  __syncthreads();
  if (node < params.num_nodes && span.holds(node)) {
    shared.known[node] = shared.stats[node].valid ? Known::kYes : Known::kInvalid;
  }
  if (tested) {
    const RowStats row = shared.stats[parent];
    if (with_draft) {
      const RowStats other = shared.stats[params.num_nodes + shared.tree[parent].inner_row];
      const int depth = shared.tree[parent].depth;
      if (shared.penalties.touch(depth)) {
        target_logit = penalise({target_logit}, shared.penalties, test.token, parent, depth, params.vocab_size).x;
      }
      test.p = row.weight(scale, target_logit) * row.inverse_mass;
      test.q = other.weight(kLog2e, draft_logit) * other.inverse_mass;
      if (row.valid && other.valid) shared.tests[node] = test;
    } else if (greedy && row.valid && row.argmax == test.token) {
      atomicMin(&shared.next[parent], node);
    }
  }
  __syncthreads();
}

// The whole group's pass over a row; the first warp of each block returns what it found.
template <LogitType kType>
__device__ __forceinline__ Partial pass(const Context<kType>& context, const Request& request, int turn) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const int num_quarters = 4 * context.num_tiles, num_removed = request.num_removed;
  const float c = request.c;
  const bool subtract = c > 0, race = request.race;
  Partial* partials = context.partials + (turn & 1) * num_quarters;
  const Broadcast<Partial> out(partials, shared.exchange, turn);
  if (threadIdx.x == 0) shared.exchange.expect(turn, num_quarters * static_cast<int>(sizeof(Partial)));
  const Row<kType> row = context.target_row(request.node);
  const DraftRow other = context.draft_row(subtract ? shared.tree[request.node].inner_row : 0);
  const bool vector = row.vectors(), other_vector = other.vectors();
  const RowStats stats = shared.stats[request.node];
  const RowStats other_stats =
      shared.stats[subtract ? params.num_nodes + shared.tree[request.node].inner_row : request.node];
  const float scale = shared.law.scale, p_scale = request.a * stats.inverse_mass;
  const int depth = shared.tree[request.node].depth;
  const bool penalised = shared.penalties.touch(depth);
  NoiseKey key = context.key(request.stream, request.node);
  if (request.stream == Stream::kCoupled) {
    key = context.key(Stream::kCoupled, 0);
    key.position += depth;
  }

#pragma unroll 1
  for (int local = warp_index();; local += kWarps) {
    const int quarter = 4 * (group_rank() + local / 4 * group_size()) + local % 4;
    if (quarter >= num_quarters) break;
    const int first = quarter * kQuarter + lane_index() * 4;
    float4 x = row.load(first, vector), y = {};
    if (subtract) y = other.load(first, other_vector);
    if (penalised) x = penalise(x, shared.penalties, first, request.node, depth, params.vocab_size);
    float w[4] = {stats.weight(scale, x.x) * p_scale, stats.weight(scale, x.y) * p_scale,
                  stats.weight(scale, x.z) * p_scale, stats.weight(scale, x.w) * p_scale};
    Partial found = {0, 0, {-1.0f, params.vocab_size}};
    if (subtract) {
      const float logits[4] = {y.x, y.y, y.z, y.w};
      float q[4], taken[4], kept[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[i] = kept[i] = exp2_fast((logits[i] - other_stats.maximum) * kLog2e) * other_stats.inverse_mass;
        taken[i] = c;
      }
#pragma unroll 1
      for (int k = 0; k < num_removed; ++k) {
        const int place = shared.removed_token[k] - first;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (place == i) taken[i] = shared.removed_scale[k], kept[i] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = fmaxf(w[i] - taken[i] * q[i], 0.0f);
      found.left = (kept[0] + kept[1]) + (kept[2] + kept[3]);
    }
    found.sum = (w[0] + w[1]) + (w[2] + w[3]);
    if (race) {
      if (found.sum > 0) {
        const float4 e = exponentials(key, static_cast<uint32_t>(first) / 4);
        const float scores[4] = {__fdividef(w[0], e.x), __fdividef(w[1], e.y), __fdividef(w[2], e.z),
                                 __fdividef(w[3], e.w)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (w[i] > 0 && scores[i] > found.best.score) found.best = {scores[i], first + i};
        }
      }
      found.best = warp_best(found.best);
    } else {
      found.left = warp_sum(found.left);
    }
    found.sum = warp_sum(found.sum);
    out.store(quarter, found);
  }
  shared.exchange.wait(turn);
  Partial result = {0, 0, {-1.0f, params.vocab_size}};
  if (warp_index() > 0) return result;
#pragma unroll 4
  for (int quarter = lane_index(); quarter < num_quarters; quarter += 32) {
    const Partial found = partials[quarter];
    result.sum += found.sum;
    result.left += found.left;
    result.best = better(result.best, found.best);
  }
  return {warp_sum(result.sum), warp_sum(result.left), warp_best(result.best)};
}

__device__ __forceinline__ void write(const VerifyParams& params, const Shared& shared, int sequence) {
  const Decision decision = shared.walk.decision;
  const int depth = shared.tree[decision.stop].depth;
  const int place = static_cast<int>(threadIdx.x);
  if (place <= params.max_depth) {
    int node = decision.stop;
    for (int above = depth; above > place; --above) node = shared.penalties.parents[node];
    params.path[static_cast<int64_t>(sequence) * (params.max_depth + 1) + place] = node;
  }
  if (threadIdx.x == kThreads - 1) {
    const bool invalid = shared.known[decision.stop] == Known::kInvalid;
    params.num_accepted[sequence] = depth;
    params.next_token[sequence] = invalid ? -1 : decision.next;
    params.invalid[sequence] = invalid;
  }
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Context<kType> context = {
      params,
      shared,
      reinterpret_cast<TileStats*>(memory + sizeof(Shared)),
      reinterpret_cast<Partial*>(memory + sizeof(Shared) + tile_bytes(params.vocab_size)),
      static_cast<int>(blockIdx.x) / group_size(),
      num_tiles(params.vocab_size),
  };
  shared.exchange.arrive();
  context.note(Mark::kStart);

  int turn = 0;
  Need need = Need::kRead;
  do {
    Partial found = {};
    if (need == Need::kRead) {
      read(context, turn == 0 ? Span(params) : Span(shared.walk.node, shared.tree[shared.walk.node]), turn);
      if (turn == 0) context.note(Mark::kStatistics);
    } else {
      found = pass(context, shared.walk.request, turn);
    }
    ++turn;
    if (warp_index() == 0) Walk(params, shared).resume(found);
    __syncthreads();
    need = shared.walk.need;
  } while (need != Need::kNothing);
  context.note(Mark::kWalk);
  if (group_rank() == 0) write(params, shared, context.sequence);
  context.note(Mark::kEnd);
  // This block has got all that others send to it, so it may leave.
}

int shared_bytes(int vocab_size) {
  return static_cast<int>(sizeof(Shared)) + tile_bytes(vocab_size) +
         8 * num_tiles(vocab_size) * static_cast<int>(sizeof(Partial));
}

}  // namespace

int verify(const VerifyParams& params, void* stream) {
  static_assert(sizeof(TreeNode) == 32 && sizeof(Shared) % 16 == 0);
  return for_type(params.logit_type, [&](auto type) -> int {
    const auto kernel = verify_kernel<decltype(type)::value>;
    const cudaError_t prepared = prepare_groups(kernel, shared_bytes(kMaxVocab));  // of this device
    if (prepared != cudaSuccess) return prepared;
    const int size = usable_group(params.cluster_size, num_tiles(params.vocab_size));
    const GroupLaunch launch(params.batch_size, size, kThreads, shared_bytes(params.vocab_size), stream);
    return cudaLaunchKernelEx(&launch.config, kernel, params);
  });
}

int max_verify_group() { return max_group_size(verify_kernel<LogitType::kFloat>, kThreads, shared_bytes(kMaxVocab)); }

}  // namespace fastspec
