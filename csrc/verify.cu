// Verification in one launch: from the logits of all tree nodes to the accepted path and the next token.
//
// A group of blocks (a cluster on sm_90) works on one sequence. The vocabulary is cut into tiles of 512 tokens; a tile
// belongs to one block, whatever the row, so that a row read twice comes from the nearest cache.
//
//   1. read         every warp takes the statistics of its tiles of the first rows of the tree and writes them into the
//                   shared memory of all blocks; for laws that cut tokens a block takes a row (threshold.cuh)
//   2. statistics   one group barrier; each block merges the tiles
//   3. walk         all threads of all blocks decide the same path from the same numbers. Where a rule needs a sum or a
//                   draw over the vocabulary the group makes a pass over that row: a warp per quarter tile, one barrier. Where
//                   the path leaves the rows that are known, the next ones are read as in 1.
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

// What a pass finds in a quarter of a tile: the mass of w, that of q over the tokens not removed, and the winner of the race.
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

// Where the walk over the tree stands; kept by the first thread of each block.
struct WalkState {
  Need need;
  Request request;
  Decision decision;
  Phase phase;
  int node;           // where the path has come to, and what to read
  int limit, length;  // block verification: nodes still to be tested, nodes drafted
  int child, num_removed;  // recursive rejection: the sibling to be tested, rejected ones before it,
  float mass, left;        // what is left of p and of q,
  float c, previous;       // and how much of q was taken off p
};

// A block's copy of all it knows about its sequence; the blocks of a group hold the same values.
struct Shared {
  ThresholdScratch scratch;
  RowStats stats[kMaxRows];  // target rows, then draft rows
  TreeNode tree[kMaxNodes];
  Penalties penalties;  // and with them the tokens and parents of the tree
  float target_logit[kMaxNodes];  // of each node's token at its parent
  float draft_logit[kMaxNodes];
  float uniform[kMaxNodes];
  float p[kMaxNodes];  // the probabilities of those logits
  float q[kMaxNodes];
  bool present[kMaxNodes];         // something was drafted, and its laws are valid
  bool known[kMaxNodes];           // the rows of this node have statistics
  int removed_token[kMaxNodes];    // rejected siblings at the current node,
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
struct Context {
  const VerifyParams& params;
  Shared& shared;
  TileStats* tiles;    // [2, kMaxRowsAtOnce, num_tiles] in shared memory
  Partial* partials;  // [2, 4 * num_tiles] likewise
  int sequence;
  int num_tiles;

  __device__ __forceinline__ Row target_row(int node) const {
    const int64_t element = (static_cast<int64_t>(sequence) * params.num_nodes + node) * params.target_stride;
    const int size = params.logit_type == LogitType::kFloat ? 4 : 2;
    return {static_cast<const char*>(params.target_logits) + element * size, params.logit_type, params.vocab_size};
  }
  __device__ __forceinline__ Row draft_row(int inner_row) const {
    const int64_t row = static_cast<int64_t>(sequence) * params.num_inner + inner_row;
    return {params.draft_logits + row * params.vocab_size, LogitType::kFloat, params.vocab_size};
  }
  __device__ __forceinline__ NoiseKey key(Stream stream, int node) const {
    return noise_key(shared.seed, shared.position, stream, node);
  }
  __device__ __forceinline__ void note(Mark mark) const {
    if (params.clock != nullptr && blockIdx.x == 0 && threadIdx.x == 0) params.clock[static_cast<int>(mark)] = clock64();
  }
};

// The walk over the tree, by the first thread of a block. It stops wherever it needs the whole group, and its function
// is called again with what the group found; `phase` says where it stopped.
struct Walk {
  const Context& context;
  Shared& shared;
  WalkState& at;

  __device__ __forceinline__ explicit Walk(const Context& context)
      : context(context), shared(context.shared), at(context.shared.walk) {}

  __device__ __forceinline__ void start() {
    at = {};
    at.limit = context.params.num_nodes - 1;
    at.length = -1;
  }

  __device__ __forceinline__ void resume(const Partial& found) {
    if (shared.law.greedy || context.params.draft_logits == nullptr) {
      match(found);
    } else if (context.params.rule == Rule::kBlock) {
      block_verification(found);
    } else {
      recursive_rejection(found);
    }
  }

  __device__ __forceinline__ void read(int which) { at.need = Need::kRead, at.node = which; }
  __device__ __forceinline__ void pass(Phase next, const Request& what) {
    at.need = Need::kPass, at.phase = next, at.request = what;
  }
  __device__ __forceinline__ void finish(int stop, int next) { at.need = Need::kNothing, at.decision = {stop, next}; }

  // Temperature 0, target-only and drafter-invariant: one token per row, followed while it is a child.
  __device__ __forceinline__ void match(const Partial& found) {
    bool drawn = at.phase == Phase::kDraw;
    for (;; drawn = false) {
      if (!shared.known[at.node]) return read(at.node);
      const RowStats& row = shared.stats[at.node];
      if (!row.valid) return finish(at.node, -1);
      if (!drawn && !shared.law.greedy) {
        const bool coupled = context.params.rule == Rule::kDrafterInvariant;
        return pass(Phase::kDraw, {at.node, 1.0f, 0.0f, 0, true, coupled ? Stream::kCoupled : Stream::kTarget});
      }
      const int next = drawn ? found.best.token : row.argmax;
      const int first = shared.tree[at.node].first_child, end = first + shared.tree[at.node].num_children;
      int match = first;
      while (match < end && shared.penalties.tokens[match] != next) ++match;
      if (match == end) return finish(at.node, next);
      at.node = match;
      at.phase = Phase::kArrive;
    }
  }

  // Chain, block verification (Sun et al. 2403.10444): the last i whose test u_i <= h_i succeeds.
  __device__ __forceinline__ void block_verification(const Partial& found) {
    const int stop = at.request.node;
    if (at.phase == Phase::kLastDraw) return finish(stop, found.best.token);
    if (at.phase == Phase::kTest) {
      const float denominator = found.sum + (1 - at.request.a);
      const float h = denominator > 0 ? found.sum / denominator : 1.0f;
      if (shared.uniform[stop] > h) {
        at.phase = Phase::kArrive;
        at.limit = stop - 1;
      }
    }
    if (at.phase == Phase::kTest || at.phase == Phase::kDraw) {
      if (found.sum > kRounding) return finish(stop, found.best.token);
      return pass(Phase::kLastDraw, {stop, 1.0f, 0.0f, 0, true, Stream::kEmit});
    }

    // The last node whose test may succeed: h <= r, so most tests fail without their sum over the vocabulary.
    int last = 0, candidate = 0;
    float r = 1, candidate_r = 1;
    while (last < at.limit) {
      if (!shared.known[last]) return read(last);
      if (!shared.present[last + 1]) break;
      ++last;
      const float carried = r * shared.p[last], q = shared.q[last];
      r = q > 0 ? fminf(1.0f, carried / q) : (carried > 0 ? 1.0f : 0.0f);
      if (shared.uniform[last] <= r) candidate = last, candidate_r = r;
    }
    if (at.length < 0) at.length = last;
    if (candidate == at.length) {
      if (!shared.known[at.length]) return read(at.length);
      if (!shared.stats[at.length].valid) return finish(at.length, -1);
      return pass(Phase::kLastDraw, {at.length, 1.0f, 0.0f, 0, true, Stream::kEmit});
    }
    pass(candidate > 0 ? Phase::kTest : Phase::kDraw, {candidate, candidate_r, 1.0f, 0, true, Stream::kEmit});
  }

  // Top-down tests of siblings drawn without replacement (RSD 2402.14160); a chain has one child each.
  //
  // After some rejections the target's law at the node is [p - c q]+ / mass for one scalar c, but for the rejected
  // tokens, whose q is gone and whose c stands still.
  __device__ __forceinline__ void recursive_rejection(const Partial& found) {
    if (at.phase == Phase::kLastDraw) return finish(at.node, found.best.token);
    if (at.phase == Phase::kDraw) {
      if (!(at.c > 0) || found.sum > kRounding) return finish(at.node, found.best.token);
      restore(at.previous);
      return pass(Phase::kLastDraw, {at.node, 1.0f, at.previous, at.num_removed, true, Stream::kEmit});
    }
    if (at.phase == Phase::kRest) {
      // What is left of q is summed anew: 1 - q has no digits where a draft was sure of what it drew first.
      at.left = found.left;
      if (found.sum > kRounding) {
        at.mass = found.sum;
      } else {
        at.c = at.previous;
        restore(at.c);
      }
      ++at.child;
    }
    for (;;) {
      const TreeNode& place = shared.tree[at.node];
      if (at.phase == Phase::kArrive) {
        if (!shared.known[at.node]) return read(at.node);
        if (!shared.stats[at.node].valid) return finish(at.node, -1);
        at.child = place.first_child;
        at.mass = at.left = 1, at.c = at.previous = 0, at.num_removed = 0;
        at.phase = Phase::kTest;
      }
      int last = place.first_child + place.num_children - 1;
      while (last >= at.child && !shared.present[last]) --last;
      for (; at.child <= last; ++at.child) {
        if (!shared.present[at.child]) continue;
        if (accepts(at.child)) break;
        if (at.child < last && at.c != at.previous) {  // only a later test needs the masses
          return pass(Phase::kRest, {at.node, 1.0f, at.c, at.num_removed, false, Stream::kEmit});
        }
      }
      if (at.child > last) return pass(Phase::kDraw, {at.node, 1.0f, at.c, at.num_removed, true, Stream::kEmit});
      at.node = at.child;
      at.phase = Phase::kArrive;
    }
  }

  // Accepts with probability min(1, (p / mass) / (q / left)), or removes the child.
  __device__ __forceinline__ bool accepts(int which) {
    const int token = shared.penalties.tokens[which];
    float q = shared.q[which], taken = at.c;
    for (int j = 0; j < at.num_removed; ++j) {
      if (shared.removed_token[j] == token) taken = shared.removed_scale[j], q = 0;
    }
    const float p = fmaxf(shared.p[which] - taken * shared.q[which], 0.0f);
    if (q > 0 && at.left > 0 ? shared.uniform[which] * q * at.mass <= p * at.left : p > 0) return true;
    at.previous = at.c;
    if (at.left > 0) at.c += at.mass / at.left;
    shared.removed_token[at.num_removed] = token;
    shared.removed_scale[at.num_removed] = q > 0 ? at.c : taken;
    ++at.num_removed;
    return false;
  }

  // Undoes the last subtraction for the token rejected last.
  __device__ __forceinline__ void restore(float scale) {
    if (at.num_removed == 0) return;
    float& removed = shared.removed_scale[at.num_removed - 1];
    removed = fminf(removed, scale);
  }
};

__device__ __forceinline__ void load_sequence(const Context& context) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const int node = static_cast<int>(threadIdx.x);
  if (node < params.num_nodes) {
    const TreeNode place = params.tree[node];
    shared.penalties.tokens[node] = static_cast<int>(params.tokens[context.sequence * params.tokens_stride + node]);
    shared.tree[node] = place;
    shared.penalties.parents[node] = place.parent;
    shared.known[node] = false;
    shared.present[node] = false;
  }
  if (threadIdx.x == kThreads - 96) Walk(context).start();
  if (threadIdx.x == kThreads - 32) shared.law = load_law(params.sampling, context.sequence, params.vocab_size);
  if (threadIdx.x == kThreads - 64) {
    const int64_t position = params.positions[context.sequence];
    const int64_t missing = params.sampling.min_tokens[context.sequence] - position;
    shared.penalties.repetition = static_cast<float>(params.sampling.repetition_penalty[context.sequence]);
    shared.penalties.shortest = static_cast<int>(max(int64_t{0}, min(missing, int64_t{kMaxNodes})));
    shared.penalties.seen = params.sampling.seen + static_cast<int64_t>(context.sequence) * params.vocab_size;
    shared.penalties.eos = params.sampling.eos_token_ids + context.sequence * kMaxEos;
    shared.seed = params.sampling.seed[context.sequence];
    shared.position = position;
  }
  __syncthreads();
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

// Target rows first, then draft rows; for each the tiles of this block.
struct Items {
  const Context& context;
  const Span& span;
  int local_tiles;

  __device__ __forceinline__ Items(const Context& context, const Span& span)
      : context(context),
        span(span),
        local_tiles((context.num_tiles - group_rank() + group_size() - 1) / group_size()) {}
  __device__ __forceinline__ int row(int item) const { return item / local_tiles; }
  __device__ __forceinline__ int tile(int item) const { return group_rank() + item % local_tiles * group_size(); }
  __device__ __forceinline__ void fetch(int item, Raw (&into)[kVectors]) const {
    const int index = row(item), draft = index - span.num_targets();
    const Row source = draft < 0 ? context.target_row(span.target(index)) : context.draft_row(span.draft(draft));
    const bool vector = source.aligned();
#pragma unroll
    for (int j = 0; j < kVectors; ++j) into[j] = source.fetch(lane_token(tile(item), j), vector);
  }
};

// What each node's test reads, before the statistics of the rows are known.
__device__ __forceinline__ void load_tests(const Context& context) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const int node = static_cast<int>(threadIdx.x);
  if (node == 0 || node >= params.num_nodes) return;
  const int token = shared.penalties.tokens[node];
  if (token < 0 || token >= params.vocab_size) return;
  const int parent = shared.penalties.parents[node];
  const float logit = context.target_row(parent)[token];
  shared.draft_logit[node] = context.draft_row(shared.tree[parent].inner_row)[token];
  shared.uniform[node] = accept_uniform(context.key(Stream::kAccept, node));
  const int depth = shared.tree[parent].depth;
  shared.target_logit[node] = logit;
  if (shared.penalties.touch(depth)) {
    shared.target_logit[node] = penalise({logit}, shared.penalties, token, parent, depth, params.vocab_size).x;
  }
}

// Statistics of the rows of a span, and the tests of the children of its nodes. `count`: reads before this one. In
// the first, what all tests need is loaded along.
__device__ __forceinline__ void read(const Context& context, const Span& span, int count) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const bool first = count == 0;
  const Items items(context, span);
  Raw raw[kVectors];
  if (first) {
    // Under way before the law is known: this warp's first item, where that is one of every law's.
    if (warp_index() < span.num_targets() * items.local_tiles) items.fetch(warp_index(), raw);
    load_sequence(context);
    group_wait();  // all blocks have started: their shared memory may be written
  }
  const Law& law = shared.law;
  const bool with_draft = params.draft_logits != nullptr && !law.greedy;
  const int num_targets = span.num_targets();
  const int num_rows = num_targets + (with_draft ? span.num_drafts() : 0);
  TileStats* tiles = context.tiles + (count & 1) * kMaxRowsAtOnce * context.num_tiles;

  const int total = num_rows * items.local_tiles;
  int item = (law.cuts() ? num_targets * items.local_tiles : 0) + warp_index();
  bool fetched = first && !law.cuts() && warp_index() < num_targets * items.local_tiles;
#pragma unroll 1
  for (; item < total; item += kWarps) {
    const int row = items.row(item), place = items.tile(item);
    const bool is_target = row < num_targets;
    if (!fetched) items.fetch(item, raw);
    fetched = false;
    const Row logits = {nullptr, is_target ? params.logit_type : LogitType::kFloat, params.vocab_size};
    float4 x[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = logits.decode(raw[j]);
    const int node = is_target ? span.target(row) : 0, depth = shared.tree[node].depth;
    if (is_target && shared.penalties.touch(depth)) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        x[j] = penalise(x[j], shared.penalties, lane_token(place, j), node, depth, params.vocab_size);
      }
    }
    const TileStats stats = tile_statistics(x, is_target ? law : plain_law(), place, params.vocab_size);
    if (lane_index() < group_size()) *in_block(&tiles[row * context.num_tiles + place], lane_index()) = stats;
  }
  if (law.cuts()) {
#pragma unroll 1
    for (int row = group_rank(); row < num_targets; row += group_size()) {
      const int node = span.target(row);
      const BlockRow logits = {context.target_row(node), &shared.penalties, node, shared.tree[node].depth};
      const RowStats stats = cut_statistics(logits, law, shared.scratch);
      if (static_cast<int>(threadIdx.x) < group_size()) *in_block(&shared.stats[node], threadIdx.x) = stats;
      __syncthreads();
    }
  }
  if (first && with_draft) load_tests(context);
  if (first) context.note(Mark::kRead);
  group_sync();

#pragma unroll 1
  for (int row = warp_index(); row < num_rows; row += kWarps) {
    const bool is_target = row < num_targets;
    if (is_target && law.cuts()) continue;
    const RowStats stats = merge_tiles(tiles + row * context.num_tiles, context.num_tiles,
                                       is_target ? law : plain_law(), params.vocab_size);
    if (lane_index() == 0) {
      shared.stats[is_target ? span.target(row) : params.num_nodes + span.draft(row - num_targets)] = stats;
    }
  }
  __syncthreads();
  const int node = static_cast<int>(threadIdx.x);
  if (node < params.num_nodes) {
    if (span.holds(node)) shared.known[node] = true;
    const int parent = shared.penalties.parents[node], token = shared.penalties.tokens[node];
    if (with_draft && node > 0 && span.holds(parent) && token >= 0 && token < params.vocab_size) {
      const RowStats row = shared.stats[parent];
      const RowStats other = shared.stats[params.num_nodes + shared.tree[parent].inner_row];
      shared.p[node] = row.weight(law.scale, shared.target_logit[node]) * row.inverse_mass;
      shared.q[node] = other.weight(kLog2e, shared.draft_logit[node]) * other.inverse_mass;
      shared.present[node] = row.valid && other.valid;
    }
  }
  __syncthreads();
}

// The whole group's pass over a row; the first warp of each block returns what it found.
__device__ __forceinline__ Partial pass(const Context& context, const Request& request, int parity) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const Row row = context.target_row(request.node);
  const RowStats stats = shared.stats[request.node];
  const float scale = shared.law.scale, p_scale = request.a * stats.inverse_mass;
  const bool subtract = request.c > 0;
  Row other = row;
  RowStats other_stats = stats;
  if (subtract) {
    const int inner_row = shared.tree[request.node].inner_row;
    other = context.draft_row(inner_row);
    other_stats = shared.stats[params.num_nodes + inner_row];
  }
  NoiseKey key = context.key(request.stream, request.node);
  if (request.stream == Stream::kCoupled) {
    key = context.key(Stream::kCoupled, 0);
    key.position += shared.tree[request.node].depth;
  }
  const int num_quarters = 4 * context.num_tiles, depth = shared.tree[request.node].depth;
  Partial* partials = context.partials + parity * num_quarters;
  const bool vector = row.aligned(), other_vector = other.aligned(), penalised = shared.penalties.touch(depth);

#pragma unroll 1
  for (int local = warp_index();; local += kWarps) {
    const int quarter = 4 * (group_rank() + local / 4 * group_size()) + local % 4;
    if (quarter >= num_quarters) break;
    const int first = quarter * kQuarter + lane_index() * 4;
    const Raw raw = row.fetch(first, vector);
    Raw other_raw = {};
    if (subtract) other_raw = other.fetch(first, other_vector);
    float4 x = row.decode(raw);
    if (penalised) x = penalise(x, shared.penalties, first, request.node, depth, params.vocab_size);
    float w[4] = {stats.weight(scale, x.x) * p_scale, stats.weight(scale, x.y) * p_scale,
                  stats.weight(scale, x.z) * p_scale, stats.weight(scale, x.w) * p_scale};
    Partial found = {0, 0, {-1.0f, params.vocab_size}};
    if (subtract) {
      const float4 y = other.decode(other_raw);
      const float logits[4] = {y.x, y.y, y.z, y.w};
      float q[4], taken[4], kept[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[i] = kept[i] = exp2_fast((logits[i] - other_stats.maximum) * kLog2e) * other_stats.inverse_mass;
        taken[i] = request.c;
      }
#pragma unroll 1
      for (int k = 0; k < request.num_removed; ++k) {
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
    if (request.race && found.sum > 0) {
      const float4 e = exponentials(key, static_cast<uint32_t>(first) / 4);
      const float scores[4] = {__fdividef(w[0], e.x), __fdividef(w[1], e.y), __fdividef(w[2], e.z),
                               __fdividef(w[3], e.w)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (w[i] > 0) found.best = better(found.best, {scores[i], first + i});
      }
    }
    found = {warp_sum(found.sum), warp_sum(found.left), warp_best(found.best)};
    if (lane_index() < group_size()) *in_block(&partials[quarter], lane_index()) = found;
  }
  group_sync();
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

__device__ __forceinline__ void write(const Context& context, Decision decision) {
  const VerifyParams& params = context.params;
  const Shared& shared = context.shared;
  const int depth = shared.tree[decision.stop].depth;
  const int place = static_cast<int>(threadIdx.x);
  if (place <= params.max_depth) {
    int node = decision.stop;
    for (int above = depth; above > place; --above) node = shared.penalties.parents[node];
    params.path[static_cast<int64_t>(context.sequence) * (params.max_depth + 1) + place] = node;
  }
  if (threadIdx.x == kThreads - 1) {
    const bool invalid = !shared.stats[decision.stop].valid;
    params.num_accepted[context.sequence] = depth;
    params.next_token[context.sequence] = invalid ? -1 : decision.next;
    params.invalid[context.sequence] = invalid;
  }
}

__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyParams params) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Context context = {params, *reinterpret_cast<Shared*>(memory),
                           reinterpret_cast<TileStats*>(memory + sizeof(Shared)),
                           reinterpret_cast<Partial*>(memory + sizeof(Shared) + tile_bytes(params.vocab_size)),
                           static_cast<int>(blockIdx.x) / group_size(), num_tiles(params.vocab_size)};
  group_arrive();
  context.note(Mark::kStart);
  // Barriers stand between two uses of the same half of a double buffer.
  Shared& shared = context.shared;
  int reads = 0, passes = 0;
  Need need = Need::kRead;
  do {
    Partial found = {};
    if (need == Need::kRead) {
      read(context, reads == 0 ? Span(params) : Span(shared.walk.node, shared.tree[shared.walk.node]), reads);
      if (reads++ == 0) context.note(Mark::kStatistics);
    } else {
      found = pass(context, shared.walk.request, passes++ & 1);
    }
    if (threadIdx.x == 0) Walk(context).resume(found);
    __syncthreads();
    need = shared.walk.need;
  } while (need != Need::kNothing);
  context.note(Mark::kTests);
  if (group_rank() == 0) write(context, shared.walk.decision);
  context.note(Mark::kEnd);
  // The last barrier stood behind the last write into another block's memory: blocks may leave as they are done.
}

int shared_bytes(int vocab_size) {
  return static_cast<int>(sizeof(Shared)) + tile_bytes(vocab_size) +
         8 * num_tiles(vocab_size) * static_cast<int>(sizeof(Partial));
}

}  // namespace

int verify(const VerifyParams& params, void* stream) {
  static_assert(sizeof(TreeNode) == 32 && sizeof(TileStats) == 8 && sizeof(Shared) % 16 == 0);
  static const cudaError_t prepared = prepare_groups(verify_kernel, shared_bytes(kMaxVocab));
  if (prepared != cudaSuccess) return prepared;
  const GroupLaunch launch(params.batch_size, params.cluster_size, kThreads, shared_bytes(params.vocab_size), stream);
  return cudaLaunchKernelEx(&launch.config, verify_kernel, params);
}

int max_verify_group() { return max_group_size(verify_kernel, kThreads, shared_bytes(kMaxVocab)); }

}  // namespace fastspec
