// The walk over the draft tree: which nodes are accepted, and where the next token comes from.
//
// The first warp of every block walks, all of them the same way from the same numbers. Where a rule needs rows that
// have not been read, or sums and draws over the vocabulary, the walk stops, says so, and is called again with what the
// group has found.
#pragma once

#include "listed.cuh"
#include "params.h"
#include "philox.cuh"
#include "rows.cuh"

namespace fastspec {

constexpr int kMaxRows = 2 * kMaxNodes;
constexpr int kMaxRequests = 4;  // passes over rows that the group makes at once
constexpr int kLastRequest = kMaxRequests;  // and the draw after a chain's last node, made ahead
constexpr int kNumRequests = kMaxRequests + 1;
constexpr int kPhases = 4;  // warps that share a slice in a pass

// Masses below this are what rounding leaves of a residual in single precision: the law before it stays.
constexpr float kRounding = 1e-6f;
// Stands for the infinite ratio p / q where q = 0: products with r stay numbers.
constexpr float kHugeRatio = 1e30f;

// What a pass finds in a part of a row: the mass of w, that of q over the tokens not removed if there is no race, and
// the winner of the race. Of a bare pass `left` is the part's maximum, to which scores are relative, and `sum` is 0, or
// NaN if a logit is NaN or +inf.
struct alignas(16) Partial {
  float sum;
  float left;
  Best best;
};

// What a pass over the row of a node shall find: the mass of w = [a p - c q]+, and a draw from it if there is a race.
struct Request {
  int node;
  float a, c;
  int num_removed;  // tokens removed before, the first in `removed_token`, keep the c they had
  bool race;
  bool bare;  // the row's statistics are not known: a draw from the law as it is
  Stream stream;
};

// Where the path stops and the token after it, -1 if the node has no law.
struct Decision {
  int stop, next;
};

// What the walk needs before it can go on: rows, or the passes of `requests`.
enum class Need { kRead, kPass, kNothing };
enum class Phase { kArrive, kTest, kRest, kDraw, kLastDraw };

// Where the walk over the tree stands.
struct WalkState {
  Need need;
  int reads, passes;  // that have been asked for before this one
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

constexpr int kNotDrawn = -2;

// Rows that are read together: those of a node and of some of its descendants.
struct Span {
  int node;
  int first_child, num_ahead;
  int inner_row, first_inner, num_inner;

  Span() = default;
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

// p / q, or what stands for infinity; division is approximate, but where p >= q it is no less than 1.
__device__ __forceinline__ float likelihood_ratio(float p, float q) {
  const float ratio = q > 0 ? fminf(__fdividef(p, q), kHugeRatio) : (p > 0 ? kHugeRatio : 0.0f);
  return q > 0 && p >= q ? fmaxf(ratio, 1.0f) : ratio;
}

struct Message;

// Where a group's messages of one kind of exchange lie.
struct Mailboxes {
  Message *slices, *rows, *parts;
};

// A block's copy of all it knows about its sequence; the blocks of a group hold the same values.
struct Shared {
  union {
    SliceLists lists;  // of a row whose threshold is searched
    ThresholdScratch scratch;
  };
  RowStats cut;  // what was found
  bool cut_found;
  Taken taken[kWarps][kListed];
  RowStats stats[kMaxRows];  // target rows, then draft rows
  TreeNode tree[kMaxNodes];
  Penalties penalties;  // and with them the tokens and parents of the tree
  Test tests[kMaxNodes];
  Known known[kMaxNodes];
  int next[kMaxNodes];  // greedy: the child that the argmax leads to; kMaxNodes if none. Small trees: see tree.cuh
  int drawn[kMaxNodes];  // rules that follow one token per row: that token, -1 if the row is no law, or kNotDrawn
  int removed_token[kMaxNodes];  // rejected siblings at the current node,
  float removed_scale[kMaxNodes];  // and how much of q was taken off them
  int passing_node[kMaxNodes];  // block verification: nodes whose test may succeed,
  float passing_r[kMaxNodes];  // and their r
  int num_requests;
  Request requests[kMaxRequests];
  Partial found[kNumRequests];
  Partial parts[kNumRequests][kPhases];
  WalkState walk;
  Span span;  // what is to be read
  Law law;
  int64_t seed;
  int64_t position;
  uint64_t epoch;  // how many launches came before
  Mailboxes mail[2];
};

// Whether the draft's law counts: not greedily, and not for rules that need none.
__device__ __forceinline__ bool weighs_draft(const VerifyParams& params, const Shared& shared) {
  return params.draft_logits != nullptr && !shared.law.greedy;
}

// The walk over the tree, by the first warp of a block. It stops wherever it needs the whole group, and is called again
// with what the group found; `phase` says where it stopped. Where it stands is every lane's own, in registers; the
// first lane's is handed on.
class Walk {
 public:
  __device__ __forceinline__ Walk(const VerifyParams& params, Shared& shared)
      : params_(params), shared_(shared), at_(shared.walk) {}

  __device__ __forceinline__ static void start(const VerifyParams& params, Shared& shared, int exchanges) {
    WalkState at = {};
    at.reads = exchanges;
    at.limit = params.num_nodes - 1;
    at.length = -1;
    shared.walk = at;
    shared.span = Span(params);
  }

  // Returns what the walk needs next.
  __device__ __forceinline__ Need resume() {
    ++(at_.need == Need::kRead ? at_.reads : at_.passes);
    __syncwarp();  // before the first lane changes it
    if (!weighs_draft(params_, shared_)) {
      if (lane_index() == 0) match();
    } else if (params_.rule == Rule::kBlock) {
      block_verification();
    } else {
      if (lane_index() == 0) recursive_rejection();
    }
    if (lane_index() == 0) shared_.walk = at_;
    __syncwarp();
    return shared_.walk.need;
  }

 private:
  __device__ __forceinline__ void read(int node) {
    at_.need = Need::kRead, at_.node = node;
    shared_.span = Span(node, shared_.tree[node]);
  }
  __device__ __forceinline__ void pass(Phase next, const Request& request) {
    at_.need = Need::kPass, at_.phase = next;
    shared_.requests[0] = request, shared_.num_requests = 1;
  }
  __device__ __forceinline__ void finish(int stop, int next) { at_.need = Need::kNothing, at_.decision = {stop, next}; }

  // Whether a draw from the row as it is needs no statistics of it first: nothing is cut.
  __device__ __forceinline__ bool bare() const { return !shared_.law.cuts; }

  // Draws the token after `node` from its own law, and ends there.
  __device__ __forceinline__ void emit(int node) {
    at_.node = node;
    if (params_.draws_last && bare() && node == params_.num_nodes - 1) {  // drawn with the first read
      return end_with(node, shared_.found[kLastRequest].best);
    }
    if (!bare()) {
      if (shared_.known[node] == Known::kNo) return read(node);
      if (shared_.known[node] == Known::kInvalid) return finish(node, -1);
    }
    pass(Phase::kLastDraw, {node, 1.0f, 0.0f, 0, true, bare(), Stream::kEmit});
  }

  // After emit(), or with the winner of another race.
  __device__ __forceinline__ void end_with(int node, const Best& best) {
    if (best.token < 0) shared_.known[node] = Known::kInvalid;
    finish(node, best.token);
  }

  // Temperature 0, target-only and drafter-invariant: one token per row, followed while it is a child.
  __device__ __forceinline__ void match() {
    if (at_.phase == Phase::kDraw) {
#pragma unroll 1
      for (int i = 0; i < shared_.num_requests; ++i) {
        shared_.drawn[shared_.requests[i].node] = shared_.found[i].best.token;
      }
    }
    for (int node = at_.node;;) {
      const bool reads = shared_.law.greedy || !bare();
      if (reads && shared_.known[node] == Known::kNo) return read(node);
      if (reads && shared_.known[node] == Known::kInvalid) return finish(node, -1);
      if (shared_.law.greedy) {
        const int next = shared_.next[node];
        if (next == kMaxNodes) return finish(node, shared_.stats[node].argmax);
        node = next;
        continue;
      }
      const int token = shared_.drawn[node];
      if (token == kNotDrawn) return request_draws(node);
      if (token < 0) return end_with(node, {0, -1});
      int child = shared_.tree[node].first_child;
      const int end = child + shared_.tree[node].num_children;
#pragma unroll 1
      while (child < end && shared_.penalties.tokens[child] != token) ++child;
      if (child == end) return finish(node, token);
      node = child;
    }
  }

  // The draw at a node and, in breadth-first order, at what follows it.
  __device__ __forceinline__ void request_draws(int node) {
    at_.need = Need::kPass, at_.phase = Phase::kDraw, at_.node = node;
    const Stream stream = params_.rule == Rule::kDrafterInvariant ? Stream::kCoupled : Stream::kTarget;
    int count = 0;
    const auto push = [&](int one) { shared_.requests[count++] = {one, 1.0f, 0.0f, 0, true, bare(), stream}; };
    push(node);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const TreeNode& place = shared_.tree[shared_.requests[i].node];
#pragma unroll 1
      for (int child = place.first_child; child < place.first_child + place.num_children; ++child) {
        if (count == kMaxRequests) break;
        if (shared_.penalties.tokens[child] >= 0 && (bare() || shared_.known[child] == Known::kYes)) push(child);
      }
    }
    shared_.num_requests = count;
  }

  // Block verification: the nodes up to `limit` whose test may succeed, with their r.
  struct Candidates {
    int count;
    int end;  // the last node that was drafted
    bool known;  // whether the rows up to `end` are
  };

  // r_i = min(1, r_{i-1} p_i / q_i) for all nodes of a chain: functions min(bound, factor * r) composed by a scan.
  __device__ __forceinline__ Candidates candidates(int limit) const {
    Candidates found = {0, 0, true};
    float carried = 1;
#pragma unroll 1
    for (int base = 0; base < limit; base += 32) {
      const int node = base + lane_index() + 1;
      const bool inside = node <= limit;
      const Known known = inside ? shared_.known[node - 1] : Known::kYes;
      const Test test = shared_.tests[inside ? node : 0];
      const bool drafted = inside && known != Known::kNo && test.token >= 0;
      float bound = 1;
      float factor = likelihood_ratio(test.p, test.q);
#pragma unroll 1
      for (int offset = 1; offset < min(32, limit - base); offset *= 2) {
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
      if (passes) {
        const int place = found.count + num_before(passing);
        shared_.passing_node[place] = node;
        shared_.passing_r[place] = r;
      }
      found.count += __popc(passing);
      found.end = base + length;
      if (length < 32) {
        found.known = __shfl_sync(kAllLanes, static_cast<int>(known), length) != static_cast<int>(Known::kNo);
        break;
      }
      carried = __shfl_sync(kAllLanes, r, 31);
    }
    __syncwarp();
    return found;
  }

  // Chain, block verification (Sun et al. 2403.10444): the last i whose test u_i <= h_i succeeds. Sums and draws of
  // several nodes are asked for at once. All lanes scan; the first one decides.
  __device__ __forceinline__ void block_verification() {
    const bool writes = lane_index() == 0;
    if (at_.phase == Phase::kLastDraw) {
      if (writes) end_with(at_.node, shared_.found[0].best);
      return;
    }
    if (at_.phase == Phase::kDraw && test_found()) return;
    // h <= r: most tests fail without their sum over the vocabulary.
    const Candidates last = candidates(at_.limit);
    const int highest = last.count > 0 ? shared_.passing_node[last.count - 1] : 0;
    if (!last.known) {
      if (writes) read(last.end);
      return;
    }
    if (highest == (at_.length < 0 ? last.end : at_.length)) {
      if (writes) emit(highest);
      return;
    }
    // From the highest on, and the root after all others; a lane for each.
    const int index = lane_index(), place = last.count - 1 - index;
    if (index < kMaxRequests && place >= -1) {
      const bool root = place < 0;
      shared_.requests[index] = {root ? 0 : shared_.passing_node[place],
                                 root ? 1.0f : shared_.passing_r[place],
                                 1.0f,
                                 0,
                                 true,
                                 false,
                                 Stream::kEmit};
    }
    if (writes) {
      if (at_.length < 0) at_.length = last.end;
      at_.need = Need::kPass, at_.phase = Phase::kDraw;
      shared_.num_requests = min(last.count + 1, kMaxRequests);
    }
  }

  // Whether one of the tests decides: the first that succeeds, a lane for each.
  __device__ __forceinline__ bool test_found() {
    const int count = shared_.num_requests, index = min(lane_index(), count - 1);
    const int node = shared_.requests[index].node;
    const Partial found = shared_.found[index];
    const float denominator = found.sum + (1 - shared_.requests[index].a);
    const float h = denominator > 0 ? __fdividef(found.sum, denominator) : 1.0f;
    const bool succeeds = node == 0 || shared_.tests[node].uniform <= h;
    const uint32_t decides = __ballot_sync(kAllLanes, lane_index() < count && succeeds);
    if (decides == 0) {
      at_.phase = Phase::kArrive;
      at_.limit = __shfl_sync(kAllLanes, node, count - 1) - 1;
      return false;
    }
    const int first = __ffs(static_cast<int>(decides)) - 1;
    if (lane_index() == 0) {
      const int stop = shared_.requests[first].node;
      const Partial& there = shared_.found[first];
      there.sum > kRounding ? finish(stop, there.best.token) : emit(stop);
    }
    return true;
  }

  // Top-down tests of siblings drawn without replacement (RSD 2402.14160); a chain has one child each.
  //
  // After some rejections the target's law at the node is [p - c q]+ / mass for one scalar c, but for the rejected
  // tokens, whose q is gone and whose c stands still.
  __device__ __forceinline__ void recursive_rejection() {
    int node = at_.node;
    const Partial found = shared_.found[0];
    if (at_.phase == Phase::kLastDraw) return end_with(node, found.best);
    if (at_.phase == Phase::kDraw) {
      if (found.sum > kRounding) return finish(node, found.best.token);
      restore(at_.previous);
      return pass(Phase::kLastDraw, {node, 1.0f, at_.previous, at_.num_removed, true, false, Stream::kEmit});
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
        if (last < first) return emit(node);
        const Known known = shared_.known[node];
        if (known == Known::kNo) return read(node);
        if (known == Known::kInvalid) return finish(node, -1);
        at_.child = first;
        at_.mass = at_.left = 1, at_.c = at_.previous = 0, at_.num_removed = 0;
        at_.phase = Phase::kTest;
      }
#pragma unroll 1
      while (last >= at_.child && shared_.tests[last].token < 0) --last;
#pragma unroll 1
      for (; at_.child <= last; ++at_.child) {
        const Test test = shared_.tests[at_.child];
        if (test.token < 0) continue;
        if (accepts(test)) break;
        if (at_.child < last && at_.c != at_.previous) {  // only a later test needs the masses
          at_.node = node;
          return pass(Phase::kRest, {node, 1.0f, at_.c, at_.num_removed, false, false, Stream::kEmit});
        }
      }
      if (at_.child > last) {
        at_.node = node;
        if (!(at_.c > 0)) return emit(node);
        return pass(Phase::kDraw, {node, 1.0f, at_.c, at_.num_removed, true, false, Stream::kEmit});
      }
      node = at_.child;
      at_.phase = Phase::kArrive;
    }
  }

  // Accepts with probability min(1, (p / mass) / (q / left)), or removes the token.
  __device__ __forceinline__ bool accepts(const Test& test) {
    float q = test.q, taken = at_.c;
#pragma unroll 1
    for (int j = 0; j < at_.num_removed; ++j) {
      if (shared_.removed_token[j] == test.token) taken = shared_.removed_scale[j], q = 0;
    }
    const float p = fmaxf(test.p - taken * test.q, 0.0f);
    if (p > 0 && (!(at_.left > 0) || test.uniform * q * at_.mass <= p * at_.left)) return true;
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
  WalkState at_;
};

}  // namespace fastspec
