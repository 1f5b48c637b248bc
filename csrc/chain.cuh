// Verification of a short chain: what a decoder does most, in as few steps as there are.
//
// Every warp learns the parameters of the sequence itself, with its first logits on their way, and every warp walks:
// a chain's path follows from a handful of numbers. How many exchanges between blocks there are depends on the law.
//
//   greedy       each slice's maxima go to the first block, which decides
//   cut          (top-k, top-p, min-p) so do its largest logits and where they are: what is kept of a row lies within a
//                warp, and with it all that a rule wants of the row
//   as it is     all blocks get the statistics of all slices, walk, and make the parts that the rule asks for of the
//                residuals; these go to the first block. The draw after the last node is made with the first read
//
// Sequences with penalties, tokens that were not drafted, and rows of which more is kept than fits the lists are left
// to the walk over trees (walk.cuh).
#pragma once

#include "context.cuh"

namespace fastspec {

constexpr int kMaxChain = 16;  // nodes
constexpr int kHalves = 2;  // warps that receive together what the phases of a pass have found
constexpr int kMaxKept = 128;  // tokens of a row that is cut
constexpr int kDecided = -1;

// What every warp knows of its sequence.
struct Sequence {
  Law law;
  int64_t seed, position;
  uint64_t launch;  // which one of the group this is
};

// The slices of a row that is cut: their largest logits and, in pairs, where these are.
struct RowLists {
  SliceLists lists;
  Sequence sequence;
  uint32_t places[kListed / 2][kMaxSlices];
};
constexpr int kPlaceBits = kPayloadBits / 2;

// What was found over a residual's tokens.
struct alignas(8) Mass {
  float sum;
  Best best;
};

struct ChainShared {
  float p[kMaxChain], q[kMaxChain];  // of each node's token at its parent; negative if that has no law
  float uniform[kMaxChain];  // of each node's test
  RowStats stats[2 * kMaxChain];  // target rows, then draft rows
  Mass parts[kMaxChain][kHalves];  // of each node's residual
  Partial drawn[kWarps];  // of a draw from a law
  Best own[kMaxChain];  // rows that are cut: a draw from the law as it is
  int redraw;  // the node from whose law the first block draws; -1: it has decided
};

// Whether the tree is a chain, verified against the draft's laws, all of which is read at once.
inline bool reads_chain(const VerifyParams& params) {
  return params.draft_logits != nullptr && params.max_depth == params.num_nodes - 1 &&
         params.root_ahead == params.max_depth;
}
// Whether it is short, too, and there is room for all its rows.
inline bool is_chain(const VerifyParams& params) {
  return reads_chain(params) && params.num_nodes > 1 && params.num_nodes <= kMaxChain &&
         params.mail_rows >= 2 * params.num_nodes - 1;
}

template <LogitType kType>
class Chain {
 public:
  __device__ __forceinline__ Chain(const Context<kType>& context, ChainShared& shared)
      : context_(context),
        params_(context.params),
        shared_(shared),
        num_nodes_(context.params.num_nodes),
        num_rows_(2 * context.params.num_nodes - 1) {}

  // By all blocks of the group. Returns kDecided; or how many exchanges there have been, and nothing is decided.
  __device__ __forceinline__ int verify() {
    Tiles tiles(context_, num_rows_ + kPhases - 1, [](int) { return true; });
    const int row = min(tiles.items.row, tiles.num_rows - 1);
    const char* const start = start_of(row);
    wait_for_inputs();
    context_.note(Mark::kStart);
    const Stored stored = load_sequence();
    float4 x[kVectors];
    load(row, start, tiles.tile, x);
    if (!learn(stored)) return 0;
    if (sequence_.law.greedy) {
      tiles.num_rows = num_nodes_;
      verify_greedy(x, tiles);
    } else if (sequence_.law.cuts) {
      tiles.num_rows = num_rows_;
      return verify_cut(x, tiles);
    } else {
      verify_whole(x, tiles);
    }
    return kDecided;
  }

 private:
  // The path: lane n looks after node n.
  struct Path {
    float r;  // of block verification; 1 at the root and for other rules
    int length;  // nodes that have a test
    uint32_t asked;  // nodes whose residual the rule asks for; 0: all `length` nodes are accepted
  };

  // What is stored of the sequence, and the lane's token. All loads come before the first use: they are under way
  // together.
  struct Stored {
    int64_t token, position, seed, min_tokens;
    uint64_t launches;
    double repetition;
    StoredLaw law;
  };
  __device__ __forceinline__ Stored load_sequence() const {
    const int sequence = context_.sequence(), node = min(lane_index(), num_nodes_ - 1);
    const SamplingParams& sampling = params_.sampling;
    return {params_.tokens[sequence * params_.tokens_stride + node],
            params_.positions[sequence],
            sampling.seed[sequence],
            sampling.min_tokens[sequence],
            context_.header()->content,
            sampling.repetition_penalty[sequence],
            StoredLaw(sampling, sequence)};
  }
  // False if the sequence is none for this way.
  __device__ __forceinline__ bool learn(const Stored& stored) {
    sequence_ = {stored.law.law(params_.vocab_size), stored.seed, stored.position, stored.launches + 1};
    token_ = static_cast<int>(stored.token);
    const bool drafted = lane_index() == 0 || (stored.token >= 0 && stored.token < params_.vocab_size);
    return __all_sync(kAllLanes, drafted) && static_cast<float>(stored.repetition) == 1.0f &&
           stored.min_tokens <= stored.position;
  }

  // Rows: the target's, then the draft's; then the last node's again, so that as many warps as there are phases can
  // have it.
  __device__ __forceinline__ bool is_target(int row) const { return row < num_nodes_ || row >= num_rows_; }
  __device__ __forceinline__ float scale_of(int row) const { return is_target(row) ? sequence_.law.scale : kLog2e; }
  __device__ __forceinline__ int first_tile(int local) const {
    return context_.slice(local) * params_.slicing.tiles_per_slice;
  }
  __device__ __forceinline__ const char* start_of(int row) const {
    return is_target(row) ? context_.target_row(row < num_nodes_ ? row : num_nodes_ - 1).logits
                          : context_.draft_row(row - num_nodes_).logits;
  }
  __device__ __forceinline__ void load(int row, const char* start, int tile, float4 (&x)[kVectors]) const {
    if (kType == LogitType::kFloat || is_target(row)) {
      load_tile(Row<kType>(start, 0, params_.vocab_size), tile, x);
    } else {
      load_tile(DraftRow(start, 0, params_.vocab_size), tile, x);
    }
  }
  __device__ __forceinline__ float logit(int row, int token) const {
    return is_target(row) ? context_.target_row(row)[token] : context_.draft_row(row - num_nodes_)[token];
  }
  __device__ __forceinline__ NoiseKey key(int node) const {
    return noise_key(sequence_.seed, sequence_.position, Stream::kEmit, node);
  }

  // Of the mailbox the first half of what is about slices is for that, the second for parts of residuals; verdicts lie
  // where rows' thresholds would.
  __device__ __forceinline__ Message* about_slice(int kind, int row, int slice) const {
    return context_.header() + 1 + ((kind * params_.mail_rows + row) * params_.slicing.num_slices + slice);
  }
  __device__ __forceinline__ Message* about_part(int node, int phase, int slice) const {
    return about_slice(kKinds, 0, 0) + ((node * kPhases + phase) * params_.slicing.num_slices + slice);
  }
  __device__ __forceinline__ Message* verdict(int row) const { return about_slice(2 * kKinds, 0, 0) + row; }
  __device__ __forceinline__ uint64_t number(uint32_t payload) const {
    return payload_number(sequence_.launch, payload);
  }
  template <int kCount, typename Wanted, typename At>
  __device__ __forceinline__ void receive_all(Message (&messages)[kCount], Wanted wanted, At at) const {
    receive_payloads(messages, sequence_.launch, wanted, at);
  }

  // Whether message i is about a slice, of those that are kCount of a lane.
  template <int kCount>
  __device__ __forceinline__ bool is_slice(int i) const {
    return lane_index() + 32 * (i % kCount) < params_.slicing.num_slices;
  }
  // One about each of a lane's slices, from that about its first on.
  template <int kCount>
  __device__ __forceinline__ void receive_slices(Message (&messages)[kCount], const Message* from) const {
    receive_all(messages, [&](int i) { return is_slice<kCount>(i); }, [&](int i) { return from + 32 * i; });
  }

  // Lets `use(at, row)` have each tile of this block's slices in x, where the first is.
  template <typename Use>
  __device__ __forceinline__ void read(float4 (&x)[kVectors], const Tiles& tiles, Use use) const {
    if (!tiles.left()) return;
    read_tiles(
        context_, tiles, x, [](int) { return true; },
        [&](const Tiles& at, float4(&x)[kVectors]) { load(at.items.row, start_of(at.items.row), at.tile, x); },
        [&](const Tiles& at) { use(at, at.items.row); });
  }

  __device__ __forceinline__ void send_slice(const Tiles& at, const TileStats& stats) const {
    if (lane_index() != 0) return;
    send(about_slice(0, at.items.row, context_.slice(at.items.local)), content_of(stats.maximum, stats.mass),
         number(0));
  }

  // What all lanes of a warp have received of the slices of a row.
  template <int kCount>
  __device__ __forceinline__ RowStats receive_row(int row) const {
    Message messages[kCount];
    receive_slices(messages, about_slice(0, row, lane_index()));
    return merge_contents<kCount>([&](int i) { return messages[i].content; },
                                  [&](int i) { return is_slice<kCount>(i); }, scale_of(row), sequence_.law.greedy);
  }
  __device__ __forceinline__ RowStats receive_row(int row) const {
    return params_.slicing.num_slices > 64 ? receive_row<4>(row) : receive_row<2>(row);
  }

  __device__ __forceinline__ void prepare_uniforms(int warp) const {
    if (warp_index() == warp && lane_index() > 0 && lane_index() < num_nodes_) {
      shared_.uniform[lane_index()] =
          accept_uniform(noise_key(sequence_.seed, sequence_.position, Stream::kAccept, lane_index()));
    }
  }

  // From the tests of all nodes to what the rule asks for; by every warp.
  __device__ __forceinline__ Path walk() const {
    const int node = lane_index();
    const bool inside = node > 0 && node < num_nodes_;
    const int place = inside ? node : 1;
    const float p = shared_.p[place], q = shared_.q[place], uniform = shared_.uniform[place];
    const uint32_t tested = __ballot_sync(kAllLanes, inside && p >= 0 && q >= 0);
    Path path = {1.0f, 0, 0};
    path.length = __ffs(static_cast<int>(~(tested | 1))) - 2;
    if (params_.rule == Rule::kBlock) {
      const float ratio = likelihood_ratio(p, q);
      float r = 1;
#pragma unroll
      for (int i = 1; i < kMaxChain; ++i) {
        if (i >= num_nodes_) break;
        r = fminf(r * __shfl_sync(kAllLanes, ratio, i), 1.0f);
        if (i == node) path.r = r;
      }
      // h <= r: most tests fail without their sum over the vocabulary.
      const uint32_t passing = __ballot_sync(kAllLanes, inside && node <= path.length && uniform <= path.r) | 1;
      if (!(passing >> path.length & 1)) path.asked = passing;
    } else {
      const bool accepted = node == 0 || (inside && node <= path.length && p > 0 && uniform * q <= p);
      const int stop = __ffs(static_cast<int>(~__ballot_sync(kAllLanes, accepted))) - 2;
      if (stop < path.length) path.asked = 1u << stop;
    }
    return path;
  }

  __device__ __forceinline__ static int highest(uint32_t nodes) { return 31 - __clz(static_cast<int>(nodes)); }
  // The nodes without the highest ones.
  __device__ __forceinline__ static uint32_t without(uint32_t nodes, int count) {
#pragma unroll 1
    for (; count > 0 && nodes != 0; --count) nodes &= ~(1u << highest(nodes));
    return nodes;
  }

  // Where the path stops, from the sums over the residuals; lane n has that of node n.
  __device__ __forceinline__ int stop(const Path& path, float sum) const {
    if (path.asked == 0) return path.length;
    const int node = lane_index();
    const float denominator = sum + (1 - path.r), h = denominator > 0 ? __fdividef(sum, denominator) : 1.0f;
    const bool asked = path.asked >> node & 1;
    const bool succeeds = params_.rule != Rule::kBlock || node == 0 || shared_.uniform[min(node, kMaxChain - 1)] <= h;
    return highest(__ballot_sync(kAllLanes, asked && succeeds));
  }

  // By one warp of the first block.
  __device__ __forceinline__ void write(int stop, int token) const {
    const int sequence = context_.sequence();
    context_.note(Mark::kWalk);
    if (lane_index() == 0) {
      params_.num_accepted[sequence] = stop;
      params_.next_token[sequence] = token;
      params_.invalid[sequence] = token < 0;
      context_.header()->content = sequence_.launch;  // all warps that send have seen the old number
    }
    if (lane_index() < num_nodes_) {
      params_.path[static_cast<int64_t>(sequence) * num_nodes_ + lane_index()] = min(lane_index(), stop);
    }
    context_.note(Mark::kEnd);
  }

  __device__ __forceinline__ void verify_greedy(float4 (&x)[kVectors], const Tiles& tiles) const {
    TileStats stats;
    read(x, tiles, [&](const Tiles& at, int row) {
      const TileStats next = greedy_statistics(x, at.tile);
      stats = at.is_first() ? next : join(stats, next, 1.0f, true);
      if (at.is_last()) send_slice(at, stats);
    });
    context_.note(Mark::kRead);
    if (context_.rank() != 0) return;
    if (warp_index() < num_nodes_) {
      const RowStats row = receive_row(warp_index());
      if (lane_index() == 0) shared_.stats[warp_index()] = row;
    }
    __syncthreads();
    context_.note(Mark::kStatistics);
    if (warp_index() != 0) return;
    const int node = lane_index();
    const RowStats row = shared_.stats[min(node, num_nodes_ - 1)];
    const int argmax = row.valid ? row.argmax : -1, before = __shfl_up_sync(kAllLanes, argmax, 1);
    const bool accepted = node == 0 || (node < num_nodes_ && before == token_);
    const int last = __ffs(static_cast<int>(~__ballot_sync(kAllLanes, accepted))) - 2;
    write(last, __shfl_sync(kAllLanes, argmax, last));
  }

  // A law that cuts nothing.
  __device__ __forceinline__ void verify_whole(float4 (&x)[kVectors], const Tiles& tiles) const {
    const int leaf = num_nodes_ - 1;
    const bool keeps = keeps_tiles();
    TileStats stats;
    Partial drawn;
    read(x, tiles, [&](const Tiles& at, int row) {
      if (row == leaf || row >= num_rows_) {
        const int phase = row == leaf ? 0 : row - num_rows_ + 1;
        const Partial next = draw(x, leaf, at.tile, phase);
        drawn = at.is_first() ? next : join(drawn, next, true, sequence_.law.scale);
        if (at.is_last()) send_draw(at, phase, drawn);
      } else {
        const float scale = scale_of(row);
        const TileStats next = tile_statistics(x, scale);
        stats = at.is_first() ? next : join(stats, next, scale, false);
        if (at.is_last()) send_slice(at, stats);
        if (keeps) {
          const int node = is_target(row) ? row : row - num_nodes_;
#pragma unroll
          for (int j = 0; j < kVectors; ++j) kept_tile(node, is_target(row) ? kTargetTile : kDraftTile, j) = x[j];
        }
      }
    });
    context_.note(Mark::kRead);
    prepare_uniforms(kWarps - 1);
#pragma unroll 1
    for (int row = warp_index(); row < num_rows_; row += kWarps) {
      if (row == leaf) continue;
      const int node = 1 + (is_target(row) ? row : row - num_nodes_);
      const float drafted = logit(row, __shfl_sync(kAllLanes, token_, node));
      const RowStats found = receive_row(row);
      if (lane_index() == 0) {
        shared_.stats[row] = found;
        const float weight = exp2_fast((drafted - found.maximum) * scale_of(row));
        (is_target(row) ? shared_.p : shared_.q)[node] = found.valid ? weight * found.inverse_mass : -1.0f;
      }
    }
    // A phase of the draw comes to the warp that has sent its own part of it, not sooner: polls are in each other's
    // way.
    if (context_.rank() == 0) {
#pragma unroll 1
      for (int phase = 0; phase < kPhases; ++phase) {
        if ((phase == 0 ? leaf : num_rows_ + phase - 1) % kWarps != warp_index()) continue;
        params_.slicing.num_slices > 64 ? receive_draw<4>(phase) : receive_draw<2>(phase);
      }
    }
    __syncthreads();
    context_.note(Mark::kStatistics);
    const Path path = walk();
    if (path.asked != 0) {
      send_parts(path);
      if (context_.rank() != 0) return;
      receive_parts(path);
      __syncthreads();
    } else if (context_.rank() != 0) {
      return;
    }
    if (warp_index() == 0) decide(path);
    __syncthreads();
    if (shared_.redraw >= 0) draw_again(context_, shared_);
  }

  // Blocks that have a single tile of each row keep it for the residuals, where rows that are cut would have their
  // lists.
  __device__ __forceinline__ bool keeps_tiles() const {
    return context_.num_local() == 1 && params_.slicing.tiles_per_slice == 1;
  }
  static constexpr int kTargetTile = 0, kDraftTile = 1;
  __device__ __forceinline__ float4& kept_tile(int node, int kind, int phase) const {
    static_assert(sizeof(RowLists) >= 2 * kTile * sizeof(float));
    return reinterpret_cast<float4*>(&row_lists(node))[(kind * kPhases + phase) * 32 + lane_index()];
  }
  __device__ __forceinline__ float4 noise_of(int node, int first) const {
    return exponentials<true>(key(node), static_cast<uint32_t>(first) / 4);
  }
  // Of a lane's four tokens in a tile of a slice that a team shares.
  __device__ __forceinline__ int first_token(int local, int i) const {
    return (first_tile(local) + i) * kTile + warp_index() % kPhases * kPhase + lane_index() * 4;
  }

  // A draw from a phase of a tile of a row as it is: scores relative to the maximum, `left`.
  __device__ __forceinline__ Partial draw(const float4 (&x)[kVectors], int node, int tile, int phase) const {
    static_assert(kPhases == kVectors);
    float4 y = x[0];
    if (phase == 1) y = x[1];
    if (phase == 2) y = x[2];
    if (phase == 3) y = x[3];
    const float maximum = warp_max(fmaxf(fmaxf(y.x, y.y), fmaxf(y.z, y.w)));
    const float reference = maximum > -kInfinity ? maximum : 0.0f;
    const auto weight = [&](float logit) { return exp2_fast((logit - reference) * sequence_.law.scale); };
    const float w[4] = {weight(y.x), weight(y.y), weight(y.z), weight(y.w)};
    const int first = lane_token(tile, phase);
    Partial found = {0, maximum, {-1.0f, params_.vocab_size}};
    // Maximum and weights pass over a NaN.
    if (!(y.x < kInfinity) | !(y.y < kInfinity) | !(y.z < kInfinity) | !(y.w < kInfinity)) found.sum = NAN;
    race(w, first, noise_of(node, first), found.best);
    return draw_of_warp(found, true);
  }

  __device__ __forceinline__ void send_draw(const Tiles& at, int phase, const Partial& drawn) const {
    if (lane_index() != 0) return;
    send_drawn(about_part(num_nodes_ - 1, phase, context_.slice(at.items.local)), drawn, true, sequence_.launch);
  }

  // What was found in half of the phases.
  template <int kCount>
  static constexpr int kMessages = kCount * kPhases / kHalves;
  template <int kCount>
  __device__ __forceinline__ void receive_half(int node, int half, Message (&messages)[kMessages<kCount>]) const {
    const Message* from[kPhases / kHalves];
#pragma unroll
    for (int i = 0; i < kPhases / kHalves; ++i) {
      from[i] = about_part(node, half * (kPhases / kHalves) + i, lane_index());
    }
    receive_all(
        messages, [&](int i) { return is_slice<kCount>(i); },
        [&](int i) { return from[i / kCount] + 32 * (i % kCount); });
  }

  // A phase of the draw after the last node.
  template <int kCount>
  __device__ __forceinline__ void receive_draw(int phase) const {
    Message messages[kCount];
    receive_slices(messages, about_part(num_nodes_ - 1, phase, lane_index()));
    Partial drawn = no_part(true, params_.vocab_size);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!is_slice<kCount>(i)) continue;
      const Partial next = drawn_of(messages[i], true);
      drawn = i == 0 ? next : join(drawn, next, true, sequence_.law.scale);
    }
    keep_draw(phase, drawn);
  }

  // What the lanes of a warp have found together.
  __device__ __forceinline__ void keep_draw(int place, const Partial& drawn) const {
    const Partial joined = draw_of_lanes(drawn, true, sequence_.law.scale);
    if (lane_index() == 0) shared_.drawn[place] = joined;
  }
  // The winner of what several warps have kept; -1 if there is no law.
  __device__ __forceinline__ int join_draws(int count) const {
    Partial drawn = no_part(true, params_.vocab_size);
    if (lane_index() < count) drawn = shared_.drawn[lane_index()];
    drawn = draw_of_lanes(drawn, true, sequence_.law.scale);
    return is_law(drawn) ? drawn.best.token : -1;
  }

  // The residuals that are asked for, over this block's slices; a team of warps for each, from the highest node on.
  __device__ __forceinline__ void send_parts(const Path& path) const {
    const int team = warp_index() / kPhases, phase = warp_index() % kPhases;
    const int num_local = context_.num_local(), tiles = params_.slicing.tiles_per_slice;
    const bool keeps = keeps_tiles();
#pragma unroll 1
    for (uint32_t nodes = without(path.asked, team); nodes != 0; nodes = without(nodes, kTeams)) {
      const int node = highest(nodes);
      const float r = __shfl_sync(kAllLanes, path.r, node);
      const Row<kType> row = context_.target_row(node);
      const DraftRow other = context_.draft_row(node);
      const bool vectors = row.vectors(), other_vectors = other.vectors();
      const RowStats target = shared_.stats[node], draft = shared_.stats[num_nodes_ + node];
      const float p_scale = r * target.inverse_mass;
#pragma unroll 1
      for (int local = 0; local < num_local; ++local) {
        Mass found = {0, {-1.0f, params_.vocab_size}};
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
          const int first = first_token(local, i);
          const float4 x = keeps ? kept_tile(node, kTargetTile, phase) : row.load(first, vectors);
          const float4 y = keeps ? kept_tile(node, kDraftTile, phase) : other.load(first, other_vectors);
          const auto residual = [&](float logit, float draft_logit) {
            const float p = exp2_fast((logit - target.maximum) * sequence_.law.scale) * p_scale;
            const float q = exp2_fast((draft_logit - draft.maximum) * kLog2e) * draft.inverse_mass;
            return fmaxf(p - q, 0.0f);
          };
          const float w[4] = {residual(x.x, y.x), residual(x.y, y.y), residual(x.z, y.z), residual(x.w, y.w)};
          const float sum = (w[0] + w[1]) + (w[2] + w[3]);
          found.sum += sum;
          if (sum > 0) race(w, first, noise_of(node, first), found.best);
        }
        found.sum = warp_sum(found.sum);
        found.best = warp_best(found.best);
        if (lane_index() == 0) {
          send(about_part(node, phase, context_.slice(local)), content_of(found.sum, found.best.score),
               number(found.best.token));
        }
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ Mass receive_part(int node, int half) const {
    Message messages[kMessages<kCount>];
    receive_half<kCount>(node, half, messages);
    Mass found = {0, {-1.0f, params_.vocab_size}};
#pragma unroll
    for (int i = 0; i < kMessages<kCount>; ++i) {
      if (!is_slice<kCount>(i)) continue;
      found.sum += first_of(messages[i].content);
      found.best = better(found.best, {second_of(messages[i].content), static_cast<int>(payload_of(messages[i]))});
    }
    return {warp_sum(found.sum), warp_best(found.best)};
  }

  __device__ __forceinline__ void receive_parts(const Path& path) const {
    constexpr int kReceivers = kWarps / kHalves;
    const int half = warp_index() % kHalves;
#pragma unroll 1
    for (uint32_t nodes = without(path.asked, warp_index() / kHalves); nodes != 0; nodes = without(nodes, kReceivers)) {
      const int node = highest(nodes);
      const Mass found = params_.slicing.num_slices > 64 ? receive_part<4>(node, half) : receive_part<2>(node, half);
      if (lane_index() == 0) shared_.parts[node][half] = found;
    }
  }

  __device__ __forceinline__ void decide(const Path& path) const {
    const Mass* const parts = shared_.parts[min(lane_index(), kMaxChain - 1)];
    Mass whole = parts[0];
#pragma unroll
    for (int half = 1; half < kHalves; ++half) {
      whole.sum += parts[half].sum;
      whole.best = better(whole.best, parts[half].best);
    }
    const int last = stop(path, whole.sum);
    int token = __shfl_sync(kAllLanes, whole.best.token, last);
    bool drawn = __shfl_sync(kAllLanes, whole.sum, last) > kRounding;
    if (path.asked == 0) {
      drawn = last == num_nodes_ - 1;
      if (drawn) token = join_draws(kPhases);
    }
    if (lane_index() == 0) shared_.redraw = drawn ? -1 : last;
    if (drawn) write(last, token);
  }

  // By the first block alone.
  __device__ __forceinline__ void draw_alone(int node) const {
    Partial drawn = no_part(true, params_.vocab_size);
#pragma unroll 1
    for (int tile = warp_index() / kPhases; tile < params_.slicing.num_tiles; tile += kTeams) {
      float4 x[kVectors];
      load(node, start_of(node), tile, x);
      drawn = join(drawn, draw(x, node, tile, warp_index() % kPhases), true, sequence_.law.scale);
    }
    keep_draw(warp_index(), drawn);
    __syncthreads();
    if (warp_index() == 0) write(node, join_draws(kWarps));
  }

  // What is seldom needed: of a residual nothing was left, or a row that is no law has been drafted from.
  __device__ __noinline__ static void draw_again(Context<kType> context, ChainShared& shared) {
    Chain chain(context, shared);
    chain.learn(chain.load_sequence());
    chain.draw_alone(shared.redraw);
  }

  // A law that cuts tokens. The first block finds a row's threshold and what it keeps by one warp; the others learn
  // whether it could.
  __device__ __forceinline__ int verify_cut(float4 (&x)[kVectors], const Tiles& tiles) {
    send_lists(x, tiles);
    context_.note(Mark::kRead);
    bool found = true;
    if (context_.rank() != 0) {
      if (warp_index() == 0) {
        const int node = min(lane_index(), num_nodes_ - 1);
        Message messages[1];
        receive_all(messages, [](int) { return true; }, [&](int) { return verdict(node); });
        found = payload_of(messages[0]) != 0;
      }
      return __syncthreads_or(!found) ? 1 : kDecided;
    }
    const int leaf = num_nodes_ - 1, draft = kWarps - 1 - warp_index();
    prepare_uniforms(kWarps / 2);
    if (draft < leaf) {
      const int row = num_nodes_ + draft;
      const float drafted = logit(row, __shfl_sync(kAllLanes, token_, draft + 1));
      const RowStats stats = receive_row(row);
      if (lane_index() == 0) {
        shared_.stats[row] = stats;
        shared_.q[draft + 1] = stats.valid ? exp2_fast((drafted - stats.maximum) * kLog2e) * stats.inverse_mass : -1.0f;
      }
    }
    Kept kept;
    const int node = warp_index();
    if (node < num_nodes_) found = receive_lists(node, kept);
    if (__syncthreads_or(!found)) return 1;
    context_.note(Mark::kStatistics);
    const Path path = walk();
    if (node < num_nodes_) keep_parts(node, kept, __shfl_sync(kAllLanes, path.r, node));
    __syncthreads();
    if (node == 0) {
      const Mass residual = shared_.parts[min(lane_index(), leaf)][0];
      const int last = stop(path, residual.sum);
      const bool drawn = path.asked != 0 && __shfl_sync(kAllLanes, residual.sum, last) > kRounding;
      const int token = __shfl_sync(kAllLanes, residual.best.token, last);
      write(last, drawn ? token : shared_.own[last].token);
    }
    return kDecided;
  }

  // A lane's share of the tokens that a row keeps.
  struct Kept {
    static constexpr int kMost = kMaxKept / 32;
    int token[kMost];
    float p[kMost], draft_logit[kMost], noise[kMost];
    int count = 0;  // of all lanes
  };

  __device__ __forceinline__ void send_lists(float4 (&x)[kVectors], const Tiles& tiles) const {
    TileStats stats;
    LargestThree largest;
    read(x, tiles, [&](const Tiles& at, int row) {
      const float scale = scale_of(row);
      const TileStats next = tile_statistics(x, scale);
      stats = at.is_first() ? next : join(stats, next, scale, false);
      if (at.is_first()) largest = {};
      if (is_target(row)) largest.add(x, (at.tile - at.first) * kTile + lane_index() * 4);
      if (at.is_last()) is_target(row) ? send_list(at, stats.mass, largest) : send_slice(at, stats);
    });
  }

  __device__ __forceinline__ void send_list(const Tiles& at, float mass, const LargestThree& largest) const {
    const Largest found = largest.take<true>(context_.shared.taken[warp_index()]);
    const int kind = lane_index(), i = 2 * kind;
    if (kind < kKinds) {
      send(about_slice(kind, at.items.row, context_.slice(at.items.local)), found.content(kind, mass),
           number(kind < kListed / 2 ? found.place(i) | found.place(i + 1) << kPlaceBits : 0));
    }
  }

  __device__ __forceinline__ static RowLists& row_lists(int node) {
    return reinterpret_cast<RowLists*>(dynamic_shared())[node];
  }

  // The lists of a node's row, and what it keeps; false if the lists do not tell, or it is too much.
  __device__ __forceinline__ bool receive_lists(int node, Kept& kept) {
    constexpr int kAtOnce = 2;  // slices of a lane
    const int num_slices = params_.slicing.num_slices, leaf = num_nodes_ - 1;
    RowLists& lists = row_lists(node);
    const float drafted = logit(node, __shfl_sync(kAllLanes, token_, min(node + 1, leaf)));
    if (lane_index() == 0) lists.sequence = sequence_;
#pragma unroll 1
    for (int first = lane_index(); first - lane_index() < num_slices; first += 32 * kAtOnce) {
      const auto slice = [&](int i) { return first + 32 * (i % kAtOnce); };
      const Message* from[kKinds];
#pragma unroll
      for (int kind = 0; kind < kKinds; ++kind) from[kind] = about_slice(kind, node, first);
      Message messages[kKinds * kAtOnce];
      receive_all(
          messages, [&](int i) { return slice(i) < num_slices; },
          [&](int i) { return from[i / kAtOnce] + 32 * (i % kAtOnce); });
#pragma unroll
      for (int i = 0; i < kKinds * kAtOnce; ++i) {
        if (slice(i) >= num_slices) continue;
        const int kind = i / kAtOnce;
        lists.lists.keep(kind, slice(i), {first_of(messages[i].content), second_of(messages[i].content)});
        if (kind < kListed / 2) lists.places[kind][slice(i)] = payload_of(messages[i]);
      }
    }
    __syncwarp();
    const int candidates = search_lists(lists.lists, num_slices, lists.sequence.law, shared_.stats[node]);
    __syncwarp();
    sequence_ = lists.sequence;  // the call had the registers to itself
    const RowStats stats = shared_.stats[node];
    const bool found = candidates != kNotTold && collect(lists, candidates, stats, kept);
    if (lane_index() == 0) send(verdict(node), 0, number(found));
    if (lane_index() == 0 && node < leaf) {
      shared_.p[node + 1] = stats.valid ? stats.weight(sequence_.law.scale, drafted) * stats.inverse_mass : -1.0f;
    }
    if (!found) return false;
#pragma unroll
    for (int i = 0; i < Kept::kMost; ++i) {
      if (32 * i >= kept.count) break;
      const bool inside = 32 * i + lane_index() < kept.count;
      kept.draft_logit[i] = inside && node < leaf ? context_.draft_row(node)[kept.token[i]] : -kInfinity;
    }
#pragma unroll
    for (int i = 0; i < Kept::kMost; ++i) {
      if (32 * i >= kept.count) break;
      kept.noise[i] = exponential(key(node), static_cast<uint32_t>(kept.token[i]));
    }
    return true;
  }

  // What a row keeps of the candidates for its threshold; false if it is too much.
  __device__ __forceinline__ bool collect(RowLists& lists, int num_candidates, const RowStats& stats,
                                          Kept& kept) const {
    Candidate* const candidates = lists.lists.candidates;
#pragma unroll 1
    for (int first = 0; first < num_candidates; first += 32) {
      const int entry = first + lane_index();
      Candidate candidate = {-kInfinity, 0};
      if (entry < num_candidates) candidate = candidates[entry];
      const bool keeps = stats.weight(sequence_.law.scale, candidate.logit) > 0;
      const uint32_t lanes = __ballot_sync(kAllLanes, keeps);
      __syncwarp();  // they move up, where all have been read
      if (keeps) candidates[kept.count + num_before(lanes)] = candidate;
      kept.count += __popc(lanes);
    }
    if (kept.count > kMaxKept) return false;
    __syncwarp();
    const int tokens = params_.slicing.tiles_per_slice * kTile;
#pragma unroll
    for (int i = 0; i < Kept::kMost; ++i) {
      if (32 * i >= kept.count) break;
      const int entry = 32 * i + lane_index();
      const bool inside = entry < kept.count;
      const Candidate candidate = candidates[inside ? entry : 0];
      const uint32_t pair = lists.places[candidate.place() / 2][candidate.slice()];
      const uint32_t place = candidate.place() % 2 == 0 ? pair & ((1u << kPlaceBits) - 1) : pair >> kPlaceBits;
      kept.token[i] = inside ? candidate.slice() * tokens + static_cast<int>(place) : 0;
      kept.p[i] = inside ? stats.weight(sequence_.law.scale, candidate.logit) * stats.inverse_mass : 0.0f;
    }
    return true;
  }

  // The residual of a node, and a draw from its law.
  __device__ __forceinline__ void keep_parts(int node, const Kept& kept, float r) const {
    const RowStats draft = shared_.stats[num_nodes_ + min(node, num_nodes_ - 2)];
    Mass residual = {0, {-1.0f, params_.vocab_size}};
    Best own = residual.best;
#pragma unroll
    for (int i = 0; i < Kept::kMost; ++i) {
      if (32 * i >= kept.count) break;
      const float q = kept.draft_logit[i] > -kInfinity
                          ? exp2_fast((kept.draft_logit[i] - draft.maximum) * kLog2e) * draft.inverse_mass
                          : 0.0f;
      const float w = fmaxf(r * kept.p[i] - q, 0.0f);
      residual.sum += w;
      if (w > 0) residual.best = better(residual.best, {__fdividef(w, kept.noise[i]), kept.token[i]});
      if (kept.p[i] > 0) own = better(own, {__fdividef(kept.p[i], kept.noise[i]), kept.token[i]});
    }
    residual.sum = warp_sum(residual.sum);
    residual.best = warp_best(residual.best);
    own = warp_best(own);
    if (own.score < 0) own.token = -1;
    if (lane_index() == 0) shared_.parts[node][0] = residual, shared_.own[node] = own;
  }

  const Context<kType>& context_;
  const VerifyParams& params_;
  ChainShared& shared_;
  const int num_nodes_, num_rows_;
  Sequence sequence_;
  int token_;  // lane n: that of node n
};

}  // namespace fastspec
