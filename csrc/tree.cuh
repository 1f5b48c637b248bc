// Verification of a small tree, by recursive rejection where a law cuts nothing, or greedily by any rule.
//
// Recursive rejection reads all rows at once, and a warp of each block looks after one inner node:
//
//   1. read     the warp reads its slices of the node's two rows and sends their statistics to all blocks
//   2. test     it merges what the same warps of other blocks have sent, and tests the children one after the other,
//               up to where the rule needs a sum over the vocabulary: the mass of what a rejected child leaves
//   3. walk     every warp follows the path from node to node. Where it comes to one that waits for a sum, all nodes
//               that do send their first, and the node's warp goes on until it has decided
//   4. draw     the token after the path, by all warps, each a part of a tile; the first block receives and writes
//
// There is no exchange but what the rule asks for on the path, and the block meets where the walk needs all nodes.
//
// Greedily the warps of a block read the rows of all nodes if there are as many warps, else of the inner ones, and
// every warp follows the path from argmax to argmax. The row of a leaf that it comes to is read then, if it was not.
// The first block alone receives what the path ends with.
#pragma once

#include "context.cuh"

namespace fastspec {

constexpr int kParts = 8;  // of a tile in a draw
constexpr int kPart = kTile / kParts;  // tokens of each, two per lane

// What comes after a node, beside a child that is accepted and kMaxNodes after a leaf whose row is not read: greedily
// kRejected says that the argmax leads to no child.
constexpr int kRejected = -1, kNeedsSum = -2, kNoStatistics = -3;

struct TreeShared {
  float c[kWarps], previous[kWarps];  // of each inner node whose children are all rejected: how much of q is off p
  Partial parts[kWarps];
  int redraw;
};

// Whether the tree is verified these ways, greedily and by recursive rejection, as far as the host knows.
inline bool is_small_tree(const VerifyParams& params) { return params.has_inner_nodes && params.max_depth < 32; }
inline bool is_small_rejection_tree(const VerifyParams& params) {
  return is_small_tree(params) && params.draft_logits != nullptr && params.rule == Rule::kRecursiveRejection &&
         2 * params.num_inner <= params.mail_rows && 7 * params.mail_rows >= kParts * params.slicing.tiles_per_slice;
}

// Whether a sequence is one for them: its laws are neither cut nor changed by penalties.
__device__ __forceinline__ bool is_small(const VerifyParams& params, const Shared& shared) {
  const Law& law = shared.law;
  return (law.greedy ? params.is_small : params.is_small_rejection) && !law.cuts &&
         shared.penalties.repetition == 1.0f && shared.penalties.shortest == 0;
}

template <LogitType kType>
class SmallTree {
 public:
  // Parameters are read once: after every message the compiler would read them from shared memory again.
  __device__ __forceinline__ SmallTree(const Context<kType>& context, TreeShared& own)
      : context_(context),
        params_(context.params),
        shared_(context.shared),
        own_(own),
        num_slices_(params_.slicing.num_slices),
        num_tiles_(params_.slicing.num_tiles),
        tiles_per_slice_(params_.slicing.tiles_per_slice),
        num_local_(context.num_local()),
        mail_(context.header() + 1),
        mail_rows_(params_.mail_rows),
        inner_(warp_index()),
        exists_(inner_ < params_.num_inner),
        node_(exists_ ? params_.inner_nodes[inner_] : 0),
        target_(context.target_row(node_)),
        draft_(context.draft_row(exists_ ? inner_ : 0)) {}

  // By all blocks of the group.
  __device__ __forceinline__ void verify() { shared_.law.greedy ? follow_argmax() : reject(); }

 private:
  // Where the path stops, and the lane's node of it.
  struct Place {
    int node, depth, next, own;
  };
  // What is drawn from the row of a node: w = [p - c q]+, or its law as it is.
  struct Draw {
    int node;
    bool bare;
    float c;
    int first_child, num_children;  // tokens removed before, in `removed_token`
  };

  __device__ __forceinline__ void follow_argmax() const {
    const int warp = warp_index();
    const bool reads_all = params_.num_nodes <= kWarps;
    const int num_rows = reads_all ? params_.num_nodes : params_.num_inner;
    const auto node_of = [&](int row) { return reads_all ? row : static_cast<int>(params_.inner_nodes[row]); };
    send_largest(0, num_rows, node_of);
    context_.note(Mark::kRead);
    if (reads_all && context_.rank() != 0) return;
    if (warp < num_rows) publish_argmax(node_of(warp), receive_largest(0, warp));
    __syncthreads();
    context_.note(Mark::kStatistics);
    const Place place = walk();
    const bool reads_leaf = place.next == kMaxNodes;
    if (reads_leaf) send_largest(1, 1, [&](int) { return place.node; });
    if (context_.rank() != 0 || warp != 0) return;
    const RowStats row = reads_leaf ? receive_largest(1, 0) : shared_.stats[place.node];
    write(place, row.valid ? row.argmax : -1);
  }

  __device__ __forceinline__ void reject() {
    if (exists_) send_statistics();
    context_.note(Mark::kRead);
    if (exists_) {
      prepare();
      publish(test());
    }
    __syncthreads();
    context_.note(Mark::kStatistics);
    Place place = walk();
#pragma unroll 1
    for (bool first = true; place.next == kNeedsSum; first = false, place = walk()) {
      __syncthreads();  // all have followed the path
      if (exists_ && first && shared_.next[node_] == kNeedsSum) send_sum();
      if (exists_ && node_ == place.node) {
        int next;
        do {
          receive_sum();
          next = test();
          if (next == kNeedsSum) send_sum();
        } while (next == kNeedsSum);
        publish(next);
      }
      __syncthreads();
    }
    finish(place);
  }

  // In the mailbox, rows come in the pairs of their nodes; sums take turns with two kinds, draws have the rest.
  // Greedily the leaf's row is of the second kind.
  __device__ __forceinline__ Message* about_slice(int kind, int row, int slice) const {
    return mail_ + ((kind * mail_rows_ + row) * num_slices_ + slice);
  }
  __device__ __forceinline__ Message* about_sum(int slice) const {
    return about_slice(1 + (round_ & 1), inner_, slice);
  }
  __device__ __forceinline__ Message* about_draw(int part) const { return about_slice(3, 0, 0) + part; }
  __device__ __forceinline__ uint64_t number(int exchange) const {
    return exchange_number(context_.launch(), exchange);
  }

  __device__ __forceinline__ int first_tile(int local) const { return context_.slice(local) * tiles_per_slice_; }
  __device__ __forceinline__ int end_tile(int local) const {
    return min(first_tile(local) + tiles_per_slice_, num_tiles_);
  }

  // The largest logits of this block's slices of some nodes' rows, and where they come first; in messages of the kind
  // and number of the exchange.
  template <typename NodeOf>
  __device__ __forceinline__ void send_largest(int exchange, int num_rows, NodeOf node_of) const {
    const auto wanted = [](int) { return true; };
    const auto load = [&](const Tiles& at, float4(&x)[kVectors]) {
      load_tile(context_.target_row(node_of(at.items.row)), at.tile, x);
    };
    const Tiles start(context_, num_rows, wanted);
    if (!start.left()) return;
    float4 x[kVectors];
    load(start, x);
    TileStats largest;
    read_tiles(context_, start, x, wanted, load, [&](const Tiles& at) {
      const TileStats next = greedy_statistics(x, at.tile);
      largest = at.is_first() ? next : join(largest, next, 1.0f, true);
      if (at.is_last() && lane_index() == 0) {
        send(about_slice(exchange, at.items.row, context_.slice(at.items.local)),
             content_of(largest.maximum, largest.mass), number(exchange));
      }
    });
  }

  __device__ __forceinline__ RowStats receive_largest(int exchange, int row) const {
    return num_slices_ > 64 ? received_largest<4>(exchange, row) : received_largest<2>(exchange, row);
  }
  template <int kCount>
  __device__ __forceinline__ RowStats received_largest(int exchange, int row) const {
    const auto inside = [&](int i) { return lane_index() + 32 * i < num_slices_; };
    const Message* const from = about_slice(exchange, row, lane_index());
    uint64_t contents[kCount];
    receive(contents, number(exchange), inside, [&](int i) { return from + 32 * i; });
    return merge_contents<kCount>([&](int i) { return contents[i]; }, inside, 1.0f, true);
  }

  // Which child the argmax of a node's row leads to.
  __device__ __forceinline__ void publish_argmax(int node, const RowStats& row) const {
    const TreeNode& place = shared_.tree[node];
    const int lane = lane_index();
    const bool leads = lane < place.num_children && shared_.penalties.tokens[place.first_child + lane] == row.argmax;
    const uint32_t lanes = __ballot_sync(kAllLanes, leads);
    if (lane != 0) return;
    shared_.stats[node] = row;
    shared_.next[node] = !row.valid   ? kNoStatistics
                         : lanes == 0 ? kRejected
                                      : place.first_child + __ffs(static_cast<int>(lanes)) - 1;
  }

  // The next tiles are under way while one is looked at.
  __device__ __forceinline__ void send_statistics() const {
    float4 x[kVectors], y[kVectors];
    load_tile(target_, first_tile(0), x);
    load_tile(draft_, first_tile(0), y);
    const float scale = shared_.law.scale;
#pragma unroll 1
    for (int local = 0; local < num_local_; ++local) {
      const int first = first_tile(local), end = end_tile(local);
      TileStats target, draft;
#pragma unroll 1
      for (int tile = first; tile < end; ++tile) {
        const int next = tile + 1 < end ? tile + 1 : first_tile(local + 1);
        const bool left = tile + 1 < end || local + 1 < num_local_;
        const TileStats p = tile_statistics(x, scale);
        if (left) load_tile(target_, next, x);
        const TileStats q = tile_statistics(y, kLog2e);
        if (left) load_tile(draft_, next, y);
        target = tile == first ? p : join(target, p, scale, false);
        draft = tile == first ? q : join(draft, q, kLog2e, false);
      }
      const int lane = lane_index();
      if (lane < 2) {
        send(about_slice(0, 2 * inner_ + lane, context_.slice(local)),
             lane == 0 ? content_of(target.maximum, target.mass) : content_of(draft.maximum, draft.mass), number(0));
      }
    }
  }

  // The tests of the node's children, a lane for each.
  __device__ __forceinline__ void prepare() {
    const TreeNode& place = shared_.tree[node_];
    const int lane = lane_index();
    first_child_ = place.first_child;
    const int child = first_child_ + min(lane, place.num_children - 1);
    token_ = shared_.penalties.tokens[child];
    const bool drafted = lane < place.num_children && token_ >= 0 && token_ < params_.vocab_size;
    const float target_logit = drafted ? target_[token_] : 0.0f;
    const float draft_logit = drafted ? draft_[token_] : 0.0f;
    uniform_ = accept_uniform(context_.key(Stream::kAccept, child));
    RowStats target, draft;
    if (num_slices_ > 64) {
      receive_statistics<4>(target, draft);
    } else {
      receive_statistics<2>(target, draft);
    }
    if (lane == 0) shared_.stats[node_] = target, shared_.stats[params_.num_nodes + inner_] = draft;
    p_ = target.weight(shared_.law.scale, target_logit) * target.inverse_mass;
    q_ = draft.weight(kLog2e, draft_logit) * draft.inverse_mass;
    valid_ = target.valid;
    untested_ = __ballot_sync(kAllLanes, drafted && target.valid && draft.valid);
  }

  template <int kCount>
  __device__ __forceinline__ void receive_statistics(RowStats& target, RowStats& draft) const {
    const Message* const from[2] = {about_slice(0, 2 * inner_, lane_index()),
                                    about_slice(0, 2 * inner_ + 1, lane_index())};
    const auto inside = [&](int i) { return lane_index() + 32 * (i % kCount) < num_slices_; };
    uint64_t contents[2 * kCount];
    receive(contents, number(0), inside, [&](int i) { return from[i / kCount] + 32 * (i % kCount); });
    target = merge_contents<kCount>([&](int i) { return contents[i]; }, inside, shared_.law.scale, false);
    draft = merge_contents<kCount>([&](int i) { return contents[kCount + i]; }, inside, kLog2e, false);
  }

  // Tests the children that are left until one is accepted, or a sum is needed; returns what comes next.
  __device__ __forceinline__ int test() {
    if (!valid_) return kNoStatistics;
#pragma unroll 1
    while (untested_ != 0) {
      const int lane = __ffs(static_cast<int>(untested_)) - 1;
      untested_ &= untested_ - 1;
      if (accepts(lane)) return first_child_ + lane;
      if (untested_ != 0 && c_ != previous_) return kNeedsSum;  // only a later test needs the masses
    }
    return kRejected;
  }

  // Accepts the child of a lane with probability min(1, (p / mass) / (q / left)), or removes its token.
  __device__ __forceinline__ bool accepts(int lane) {
    const int token = __shfl_sync(kAllLanes, token_, lane);
    const float child_p = __shfl_sync(kAllLanes, p_, lane), child_q = __shfl_sync(kAllLanes, q_, lane);
    const float uniform = __shfl_sync(kAllLanes, uniform_, lane);
    float q = child_q, taken = c_;
    const uint32_t same = removed_ & __ballot_sync(kAllLanes, token_ == token);
    if (same != 0) taken = __shfl_sync(kAllLanes, scale_, 31 - __clz(static_cast<int>(same))), q = 0;
    const float p = fmaxf(child_p - taken * child_q, 0.0f);
    if (p > 0 && (!(left_ > 0) || uniform * q * mass_ <= p * left_)) return true;
    previous_ = c_;
    if (left_ > 0) c_ += mass_ / left_;
    removed_ |= 1u << lane;
    if (lane_index() == lane) scale_ = q > 0 ? c_ : taken;
    return false;
  }

  // The mass that is left of p, and of q, in this block's slices.
  __device__ __forceinline__ void send_sum() const {
    const RowStats target = shared_.stats[node_], draft = shared_.stats[params_.num_nodes + inner_];
    const float scale = shared_.law.scale;
#pragma unroll 1
    for (int local = 0; local < num_local_; ++local) {
      float sum = 0, left = 0;
#pragma unroll 1
      for (int tile = first_tile(local); tile < end_tile(local); ++tile) {
        float4 x[kVectors], y[kVectors];
        load_tile(target_, tile, x);
        load_tile(draft_, tile, y);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          const int first = lane_token(tile, j);
          const float logits[4] = {x[j].x, x[j].y, x[j].z, x[j].w}, others[4] = {y[j].x, y[j].y, y[j].z, y[j].w};
          float q[4], kept[4], taken[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            q[i] = kept[i] = draft.weight(kLog2e, others[i]) * draft.inverse_mass;
            taken[i] = c_;
          }
#pragma unroll 1
          for (uint32_t removed = removed_; removed != 0; removed &= removed - 1) {
            const int lane = __ffs(static_cast<int>(removed)) - 1;
            const int place = __shfl_sync(kAllLanes, token_, lane) - first;
            const float removed_scale = __shfl_sync(kAllLanes, scale_, lane);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (place == i) taken[i] = removed_scale, kept[i] = 0;
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float p = target.weight(scale, logits[i]) * target.inverse_mass;
            sum += fmaxf(fmaf(-taken[i], q[i], p), 0.0f);
            left += kept[i];
          }
        }
      }
      sum = warp_sum(sum), left = warp_sum(left);
      const int slice = context_.slice(local);
      if (lane_index() == 0) send(about_sum(slice), content_of(sum, left), number(1 + round_));
    }
  }

  // What all blocks have found so.
  __device__ __forceinline__ void receive_sum() {
    const float2 found = num_slices_ > 64 ? received_sum<4>() : received_sum<2>();
    ++round_;
    // What is left of q is summed anew: 1 - q has no digits where a draft was sure of what it drew first.
    left_ = found.y;
    if (found.x > kRounding) {
      mass_ = found.x;
    } else {
      c_ = previous_;
      if (lane_index() == 31 - __clz(static_cast<int>(removed_))) scale_ = fminf(scale_, c_);
    }
  }
  template <int kCount>
  __device__ __forceinline__ float2 received_sum() const {
    const auto inside = [&](int i) { return lane_index() + 32 * i < num_slices_; };
    const Message* const from = about_sum(lane_index());
    uint64_t contents[kCount];
    receive(contents, number(1 + round_), inside, [&](int i) { return from + 32 * i; });
    float2 found = {0, 0};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (inside(i)) found.x += first_of(contents[i]), found.y += second_of(contents[i]);
    }
    return {warp_sum(found.x), warp_sum(found.y)};
  }

  // What comes after the node, to the block.
  __device__ __forceinline__ void publish(int next) const {
    const int lane = lane_index();
    if (lane == 0) shared_.next[node_] = next, own_.c[inner_] = c_, own_.previous[inner_] = previous_;
    if (next == kRejected && lane < shared_.tree[node_].num_children) {
      shared_.removed_token[first_child_ + lane] = removed_ >> lane & 1 ? token_ : -1;
      shared_.removed_scale[first_child_ + lane] = scale_;
    }
  }

  // Follows the path as far as it is known.
  __device__ __forceinline__ Place walk() const {
    Place place = {0, 0, shared_.next[0], 0};
#pragma unroll 1
    while (place.next >= 0 && place.next < kMaxNodes) {
      place.node = place.next;
      if (lane_index() >= ++place.depth) place.own = place.node;
      place.next = shared_.next[place.node];
    }
    return place;
  }

  // The draw of the token after the path.
  __device__ __forceinline__ void finish(const Place& place) const {
    if (place.next == kNoStatistics) {
      if (context_.rank() == 0 && warp_index() == 0) write(place, -1);
      return;
    }
    const TreeNode& tree = shared_.tree[place.node];
    Draw draw = {place.node, true, 0.0f, tree.first_child, tree.num_children};
    if (place.next == kRejected) draw.c = own_.c[tree.inner_row], draw.bare = !(draw.c > 0);
    int turn = 0;
#pragma unroll 1
    for (int local = 0; local < num_local_; ++local) {
#pragma unroll 1
      for (int tile = first_tile(local); tile < end_tile(local); ++tile, ++turn) {
        if ((turn & 1) != warp_index() / kParts) continue;
        const int part = warp_index() % kParts;
        const Partial found = draw_of_warp(draw_part(draw, tile, part), draw.bare);
        if (lane_index() == 0) {
          send_drawn(about_draw(tile * kParts + part), found, draw.bare, context_.launch());
        }
      }
    }
    if (context_.rank() != 0) return;
    const int total = num_tiles_ * kParts;
    Partial whole = total <= kThreads ? receive_draw<1>(draw.bare, total) : receive_draw<4>(draw.bare, total);
    whole = of_block(whole, draw.bare);
    if (warp_index() == 0) {
      const bool again = !draw.bare && !(whole.sum > kRounding);
      if (lane_index() == 0) own_.redraw = again;
      if (!again) write(place, draw.bare && !is_law(whole) ? -1 : whole.best.token);
    }
    __syncthreads();
    if (own_.redraw) draw_again(context_, own_, place);
  }

  // A lane's two tokens.
  template <LogitType kRow>
  __device__ __forceinline__ static float2 load_two(const Row<kRow>& row, int first) {
    float2 x = {-kInfinity, -kInfinity};
    if constexpr (kRow == LogitType::kFloat) {
      if (row.vectors()) {
        if (first < row.vocab_size) x = *reinterpret_cast<const float2*>(row.logits + 4 * first);
        return x;
      }
    }
    if (first < row.vocab_size) x.x = row[first];
    if (first + 1 < row.vocab_size) x.y = row[first + 1];
    return x;
  }

  __device__ __forceinline__ Partial draw_part(const Draw& draw, int tile, int part) const {
    const float scale = shared_.law.scale;
    const int first = tile * kTile + part * kPart + 2 * lane_index();
    const float2 x = load_two(context_.target_row(draw.node), first);
    Partial found = no_part(draw.bare, params_.vocab_size);
    float w[2];
    if (draw.bare) {
      const float maximum = warp_max(fmaxf(x.x, x.y)), reference = maximum > -kInfinity ? maximum : 0.0f;
      w[0] = exp2_fast((x.x - reference) * scale), w[1] = exp2_fast((x.y - reference) * scale);
      found.left = maximum;
    } else {
      const int inner = shared_.tree[draw.node].inner_row;
      const RowStats target = shared_.stats[draw.node], draft = shared_.stats[params_.num_nodes + inner];
      const float2 y = load_two(context_.draft_row(inner), first);
      float taken[2] = {draw.c, draw.c};
#pragma unroll 1
      for (int child = draw.first_child; child < draw.first_child + draw.num_children; ++child) {
        const int place = shared_.removed_token[child] - first;
        const float removed_scale = shared_.removed_scale[child];
        if (shared_.removed_token[child] < 0) continue;
        if (place == 0) taken[0] = removed_scale;
        if (place == 1) taken[1] = removed_scale;
      }
      const auto residual = [&](float logit, float draft_logit, float scale_of_q) {
        const float p = target.weight(scale, logit) * target.inverse_mass;
        const float q = draft.weight(kLog2e, draft_logit) * draft.inverse_mass;
        return fmaxf(fmaf(-scale_of_q, q, p), 0.0f);
      };
      w[0] = residual(x.x, y.x, taken[0]), w[1] = residual(x.y, y.y, taken[1]);
    }
    if (!draw.bare) found.sum = w[0] + w[1];
    // Maximum and weights pass over a NaN.
    if (draw.bare && (!(x.x < kInfinity) | !(x.y < kInfinity))) found.sum = NAN;
    const float2 e = exponentials_of_pair(context_.key(Stream::kEmit, draw.node), static_cast<uint32_t>(first) / 4);
    const float scores[2] = {__fdividef(w[0], e.x), __fdividef(w[1], e.y)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (w[j] > 0 && scores[j] > found.best.score) found.best = {scores[j], first + j};
    }
    return found;
  }

  // What the warps of the block have found together; to the first.
  __device__ __forceinline__ Partial of_block(Partial found, bool bare) const {
    const float scale = shared_.law.scale;
    found = draw_of_lanes(found, bare, scale);
    if (lane_index() == 0) own_.parts[warp_index()] = found;
    __syncthreads();
    found = no_part(bare, params_.vocab_size);
    if (lane_index() < kWarps) found = own_.parts[lane_index()];
    return draw_of_lanes(found, bare, scale);
  }

  // By all threads of the first block, each so many messages at a time.
  template <int kCount>
  __device__ __forceinline__ Partial receive_draw(bool bare, int total) const {
    Partial found = no_part(bare, params_.vocab_size);
#pragma unroll 1
    for (int base = 0; base < total; base += kCount * kThreads) {
      const auto place = [&](int i) { return base + i * kThreads + static_cast<int>(threadIdx.x); };
      Message messages[kCount];
      receive_payloads(
          messages, context_.launch(), [&](int i) { return place(i) < total; },
          [&](int i) { return about_draw(min(place(i), total - 1)); });
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (place(i) >= total) continue;
        found = join(found, drawn_of(messages[i], bare), bare, shared_.law.scale);
      }
    }
    return found;
  }

  // By one warp of the first block.
  __device__ __forceinline__ void write(const Place& place, int token) const {
    const int sequence = context_.sequence(), lane = lane_index();
    context_.note(Mark::kWalk);
    if (lane == 0) {
      params_.num_accepted[sequence] = place.depth;
      params_.next_token[sequence] = token;
      params_.invalid[sequence] = token < 0;
      context_.header()->content = context_.launch();  // all blocks have sent something, so all have seen the old one
    }
    if (lane <= params_.max_depth) {
      params_.path[static_cast<int64_t>(sequence) * (params_.max_depth + 1) + lane] = place.own;
    }
    context_.note(Mark::kEnd);
  }

  // What is seldom needed: of a residual nothing was left, and the law before it stays; by the first block alone.
  __device__ __noinline__ static void draw_again(Context<kType> context, TreeShared& own, Place place) {
    const SmallTree tree(context, own);
    const TreeNode& node = context.shared.tree[place.node];
    const Draw draw = {place.node, false, own.previous[node.inner_row], node.first_child, node.num_children};
    if (threadIdx.x == 0) {
      int last = draw.first_child + draw.num_children - 1;
      while (last > draw.first_child && context.shared.removed_token[last] < 0) --last;
      float& scale = context.shared.removed_scale[last];
      scale = fminf(scale, draw.c);
    }
    __syncthreads();
    Partial found = no_part(false, context.params.vocab_size);
#pragma unroll 1
    for (int tile = warp_index() / kParts; tile < context.params.slicing.num_tiles; tile += kWarps / kParts) {
      found = join(found, tree.draw_part(draw, tile, warp_index() % kParts), false, 1.0f);
    }
    found = tree.of_block(found, false);
    if (warp_index() == 0) tree.write(place, found.best.token);
  }

  const Context<kType>& context_;
  const VerifyParams& params_;
  Shared& shared_;
  TreeShared& own_;
  const int num_slices_, num_tiles_, tiles_per_slice_, num_local_;
  Message* const mail_;
  const int mail_rows_;
  // The warp's node, if there is one, and its rows.
  const int inner_;
  const bool exists_;
  const int node_;
  const Row<kType> target_;
  const DraftRow draft_;
  bool valid_;
  int first_child_;
  // The lane's child.
  int token_;
  float p_, q_, uniform_, scale_ = 0;
  // Children still to be tested and those rejected; what is left of p and of q, and how much of q was taken off p.
  uint32_t untested_, removed_ = 0;
  float mass_ = 1, left_ = 1, c_ = 0, previous_ = 0;
  int round_ = 0;  // sums so far
};

}  // namespace fastspec
