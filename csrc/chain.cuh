// Verification of a short chain: what a decoder does most, in as few steps as there are.
//
// Every warp learns the parameters of the sequence itself, with its first logits on their way, and every warp walks:
// a chain's path follows from a handful of numbers. How many exchanges between blocks there are depends on the law.
//
//   greedy       each slice's maxima go to the first block, which decides
//   cut          (top-k, top-p, min-p) so do its largest logits and where they are: what is kept of a row lies within
//   one
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
constexpr int kMaxKept = 128;  // tokens of a row that is cut
constexpr int kDecided = -1;
constexpr uint32_t kNoLaw = kPayload;  // in place of a token: the row has a NaN or +inf

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
  float uniform[kMaxChain];          // of each node's test
  RowStats stats[2 * kMaxChain];     // target rows, then draft rows
  Mass parts[kMaxChain][kPhases];    // of each node's residual, or of a draw from its law
  Best own[kMaxChain];               // rows that are cut: a draw from the law as it is
  int redraw;                        // the node from whose law the first block draws; -1: it has decided
};

// Whether the tree is such a chain, all of whose rows there is room for.
inline bool is_chain(const VerifyParams& params) {
  return params.num_nodes > 1 && params.num_nodes <= kMaxChain && params.max_depth == params.num_nodes - 1 &&
         params.root_ahead == params.max_depth && params.mail_rows >= 2 * params.num_nodes - 1 &&
         params.draft_logits != nullptr;
}

template <LogitType kType>
class Chain {
 public:
  __device__ __forceinline__ Chain(const Context<kType>& context, ChainShared& shared)
      : context_(context), params_(context.params), shared_(shared), num_nodes_(context.params.num_nodes) {}

  // By all blocks of the group. Returns kDecided; or how many exchanges there have been, and nothing is decided.
  __device__ __forceinline__ int verify() {
    const int num_rows = 2 * num_nodes_ - 1;
    Tiles tiles(context_, num_rows, [](int) { return true; });
    const int row = min(tiles.items.row, num_rows - 1);
    const char* start = start_of(row);
    wait_for_inputs(start);
    context_.note(Mark::kStart);
    float4 x[kVectors];
    load(row, start, tiles.tile, x);
    if (!load_sequence()) return 0;
    if (!sequence_.law.greedy && sequence_.law.cuts) return verify_cut(x, tiles);
    if (sequence_.law.greedy) tiles.num_rows = num_nodes_;
    sequence_.law.greedy ? verify_greedy(x, tiles) : verify_whole(x, tiles);
    return kDecided;
  }

 private:
  // The path: lane n looks after node n.
  struct Path {
    float r;          // of block verification; 1 at the root and for other rules
    int length;       // nodes that have a test
    uint32_t asked;   // nodes whose residual the rule asks for; 0: all `length` nodes are accepted
  };

  // False if the sequence is none for this way. All loads come before the first use: they are under way together.
  __device__ __forceinline__ bool load_sequence() {
    const int sequence = context_.sequence(), node = min(lane_index(), num_nodes_ - 1);
    const int64_t token = params_.tokens[sequence * params_.tokens_stride + node];
    const double repetition = params_.sampling.repetition_penalty[sequence];
    const int64_t min_tokens = params_.sampling.min_tokens[sequence];
    sequence_.position = params_.positions[sequence];
    sequence_.seed = params_.sampling.seed[sequence];
    sequence_.launch = context_.header()->content + 1;
    sequence_.law = load_law(params_.sampling, sequence, params_.vocab_size);
    const bool drafted = node == 0 || (token >= 0 && token < params_.vocab_size);
    token_ = static_cast<int>(token);
    return __all_sync(kAllLanes, drafted) && static_cast<float>(repetition) == 1.0f && min_tokens <= sequence_.position;
  }

  // Rows: the target's, then the draft's.
  __device__ __forceinline__ bool is_target(int row) const { return row < num_nodes_; }
  __device__ __forceinline__ int first_tile(int local) const {
    return context_.slice(local) * params_.slicing.tiles_per_slice;
  }
  __device__ __forceinline__ const char* start_of(int row) const {
    return is_target(row) ? context_.target_row(row).logits : context_.draft_row(row - num_nodes_).logits;
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
    return sequence_.launch << kNumberBits | 1u << kPayloadBits | payload;
  }
  template <int kCount, typename Wanted, typename At>
  __device__ __forceinline__ void receive_all(Message (&messages)[kCount], Wanted wanted, At at) const {
    receive(messages, [&](uint64_t found) { return found >> kPayloadBits == (sequence_.launch << 1 | 1); }, wanted, at);
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
    const int num_slices = params_.slicing.num_slices;
    const auto inside = [&](int i) { return lane_index() + 32 * i < num_slices; };
    const Message* const from = about_slice(0, row, lane_index());
    Message messages[kCount];
    receive_all(messages, inside, [&](int i) { return from + 32 * i; });
    TileStats slices[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      slices[i] = {-kInfinity, 0.0f};
      if (inside(i)) slices[i] = {first_of(messages[i].content), second_of(messages[i].content)};
    }
    return merge_slices(slices, is_target(row) ? sequence_.law.scale : kLog2e, sequence_.law.greedy);
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
      const float ratio = q > 0 ? fminf(__fdividef(p, q), kHugeRatio) : (p > 0 ? kHugeRatio : 0.0f);
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
    TileStats stats;
    Partial drawn;
    read(x, tiles, [&](const Tiles& at, int row) {
      if (row == leaf) {
        const Partial next = draw(x, leaf, at.tile);
        drawn = at.is_first() ? next : join(drawn, next, true, sequence_.law.scale);
        if (at.is_last()) send_draw(at, drawn);
      } else {
        const float scale = is_target(row) ? sequence_.law.scale : kLog2e;
        const TileStats next = tile_statistics(x, scale);
        stats = at.is_first() ? next : join(stats, next, scale, false);
        if (at.is_last()) send_slice(at, stats);
      }
    });
    context_.note(Mark::kRead);
    prepare_uniforms(kWarps - 1);
    if (draws_ahead()) draw_noise();
#pragma unroll 1
    for (int row = warp_index(); row < 2 * num_nodes_ - 1; row += kWarps) {
      if (row == leaf) continue;
      const int node = 1 + (is_target(row) ? row : row - num_nodes_);
      const float drafted = logit(row, __shfl_sync(kAllLanes, token_, node));
      const RowStats found = receive_row(row);
      if (lane_index() == 0) {
        shared_.stats[row] = found;
        const float weight = exp2_fast((drafted - found.maximum) * (is_target(row) ? sequence_.law.scale : kLog2e));
        (is_target(row) ? shared_.p : shared_.q)[node] = found.valid ? weight * found.inverse_mass : -1.0f;
      }
    }
    __syncthreads();
    context_.note(Mark::kStatistics);
    const Path path = walk();
    if (path.asked != 0) {
      send_parts(path);
      if (context_.rank() != 0) return;
      receive_parts(path);
    } else {
      if (context_.rank() != 0) return;
      // Not needed if the path stops before; but when it has come, all warps that send have learned which launch this
      // is.
      if (warp_index() < kPhases) receive_draw(leaf);
    }
    __syncthreads();
    if (warp_index() == 0) decide(path);
    __syncthreads();
    if (shared_.redraw >= 0) draw_again(context_, shared_);
  }

  // The noise of the residuals' races, of which some will be asked for, is drawn while the statistics are under way; by
  // blocks that have a slice each, for which there is room where rows that are cut would have their lists.
  __device__ __forceinline__ bool draws_ahead() const { return context_.num_local() == 1; }
  __device__ __forceinline__ float4 noise_of(int node, int first) const {
    return exponentials<true>(key(node), static_cast<uint32_t>(first) / 4);
  }
  __device__ __forceinline__ float4* noise_place(int node, int i) const {
    constexpr int kThreadsOfTeam = 32 * kPhases;
    static_assert(sizeof(RowLists) >= kMaxTiles * kThreadsOfTeam * sizeof(float4));
    return reinterpret_cast<float4*>(&row_lists(node)) + i * kThreadsOfTeam + threadIdx.x % kThreadsOfTeam;
  }
  __device__ __forceinline__ void draw_noise() const {
    const int tiles = params_.slicing.tiles_per_slice;
    // The last team has the fewest rows.
#pragma unroll 1
    for (int node = kTeams - 1 - warp_index() / kPhases; node < num_nodes_ - 1; node += kTeams) {
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) *noise_place(node, i) = noise_of(node, first_token(0, i));
    }
  }
  // Of a lane's four tokens in a tile of a slice that a team shares.
  __device__ __forceinline__ int first_token(int local, int i) const {
    return (first_tile(local) + i) * kTile + warp_index() % kPhases * kPhase + lane_index() * 4;
  }

  // A draw from a tile of a row as it is: scores and mass relative to the maximum, `left`.
  __device__ __forceinline__ Partial draw(const float4 (&x)[kVectors], int node, int tile) const {
    const float maximum = tile_maximum(x), reference = maximum > -kInfinity ? maximum : 0.0f;
    Partial found = {0, maximum, {-1.0f, params_.vocab_size}};
#pragma unroll 1
    for (int j = 0; j < kVectors; ++j) {
      float4 y = x[0];
      if (j == 1) y = x[1];
      if (j == 2) y = x[2];
      if (j == 3) y = x[3];
      const int first = lane_token(tile, j);
      const auto weight = [&](float logit) { return exp2_fast((logit - reference) * sequence_.law.scale); };
      const float w[4] = {weight(y.x), weight(y.y), weight(y.z), weight(y.w)};
      found.sum += (w[0] + w[1]) + (w[2] + w[3]);
      // Maximum and weights pass over a NaN.
      if (!(y.x < kInfinity) | !(y.y < kInfinity) | !(y.z < kInfinity) | !(y.w < kInfinity)) found.sum = NAN;
      race(w, first, noise_of(node, first), found.best);
    }
    found.sum = warp_sum(found.sum);
    found.best = warp_best(found.best);
    return found;
  }

  __device__ __forceinline__ void race(const float (&w)[4], int first, const float4& e, Best& best) const {
    const float scores[4] = {__fdividef(w[0], e.x), __fdividef(w[1], e.y), __fdividef(w[2], e.z),
                             __fdividef(w[3], e.w)};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (w[j] > 0 && scores[j] > best.score) best = {scores[j], first + j};
    }
  }

  // Of the mass of a draw no more is told than whether there is one.
  __device__ __forceinline__ void send_draw(const Tiles& at, const Partial& drawn) const {
    const bool law = drawn.sum < kInfinity;
    if (lane_index() == 0) {
      send(about_part(at.items.row, 0, context_.slice(at.items.local)), content_of(drawn.left, drawn.best.score),
           number(law ? drawn.best.token : kNoLaw));
    }
  }

  // By the first warps, of which each receives some slices.
  __device__ __forceinline__ void receive_draw(int node) const {
    const int num_slices = params_.slicing.num_slices, slice = static_cast<int>(threadIdx.x);
    Message messages[1];
    receive_all(messages, [&](int) { return slice < num_slices; }, [&](int) { return about_part(node, 0, slice); });
    Partial drawn = {0, -kInfinity, {-1.0f, params_.vocab_size}};
    if (slice < num_slices) {
      const int token = static_cast<int>(messages[0].number & kPayload);
      drawn = {token == static_cast<int>(kNoLaw) ? NAN : 1.0f,
               first_of(messages[0].content),
               {second_of(messages[0].content), token}};
    }
    keep_draw(shared_.parts[node][warp_index()], drawn);
  }

  // What the lanes of a warp have found together, for decide().
  __device__ __forceinline__ void keep_draw(Mass& part, Partial drawn) const {
    const float maximum = warp_max(drawn.left);
    drawn.best.score *= drawn.left > -kInfinity ? exp2_fast((drawn.left - maximum) * sequence_.law.scale) : 0.0f;
    const bool law = __all_sync(kAllLanes, drawn.sum < kInfinity);
    const Best best = warp_best(drawn.best);
    if (lane_index() == 0) part = {law ? maximum : NAN, best};
  }

  // The winner of what several warps have kept; -1 if there is no law.
  __device__ __forceinline__ int join_draws(const Mass* parts, int count) const {
    float maximum = -kInfinity;
    bool law = true;
    for (int i = 0; i < count; ++i) maximum = fmaxf(maximum, parts[i].sum), law = law && !isnan(parts[i].sum);
    Best best = {-1.0f, params_.vocab_size};
    for (int i = 0; i < count; ++i) {
      Best other = parts[i].best;
      other.score *= parts[i].sum > -kInfinity ? exp2_fast((parts[i].sum - maximum) * sequence_.law.scale) : 0.0f;
      best = better(best, other);
    }
    return law && maximum > -kInfinity ? best.token : -1;
  }

  // The residuals that are asked for, over this block's slices; a team of warps for each, from the highest node on.
  __device__ __forceinline__ void send_parts(const Path& path) const {
    const int team = warp_index() / kPhases, phase = warp_index() % kPhases;
    const int num_local = context_.num_local(), tiles = params_.slicing.tiles_per_slice;
    const bool ahead = draws_ahead();
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
          const float4 x = row.load(first, vectors), y = other.load(first, other_vectors);
          const auto residual = [&](float logit, float draft_logit) {
            const float p = exp2_fast((logit - target.maximum) * sequence_.law.scale) * p_scale;
            const float q = exp2_fast((draft_logit - draft.maximum) * kLog2e) * draft.inverse_mass;
            return fmaxf(p - q, 0.0f);
          };
          const float w[4] = {residual(x.x, y.x), residual(x.y, y.y), residual(x.z, y.z), residual(x.w, y.w)};
          const float sum = (w[0] + w[1]) + (w[2] + w[3]);
          found.sum += sum;
          if (sum > 0) race(w, first, ahead ? *noise_place(node, i) : noise_of(node, first), found.best);
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
  __device__ __forceinline__ Mass receive_part(int node, int phase) const {
    const int num_slices = params_.slicing.num_slices;
    const auto inside = [&](int i) { return lane_index() + 32 * i < num_slices; };
    const Message* const from = about_part(node, phase, lane_index());
    Message messages[kCount];
    receive_all(messages, inside, [&](int i) { return from + 32 * i; });
    Mass found = {0, {-1.0f, params_.vocab_size}};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!inside(i)) continue;
      found.sum += first_of(messages[i].content);
      found.best =
          better(found.best, {second_of(messages[i].content), static_cast<int>(messages[i].number & kPayload)});
    }
    return {warp_sum(found.sum), warp_best(found.best)};
  }

  __device__ __forceinline__ void receive_parts(const Path& path) const {
    const int team = warp_index() / kPhases, phase = warp_index() % kPhases;
#pragma unroll 1
    for (uint32_t nodes = without(path.asked, team); nodes != 0; nodes = without(nodes, kTeams)) {
      const int node = highest(nodes);
      const Mass found = params_.slicing.num_slices > 64 ? receive_part<4>(node, phase) : receive_part<2>(node, phase);
      if (lane_index() == 0) shared_.parts[node][phase] = found;
    }
  }

  __device__ __forceinline__ void decide(const Path& path) const {
    const Mass* const parts = shared_.parts[min(lane_index(), kMaxChain - 1)];
    Mass whole = parts[0];
#pragma unroll
    for (int phase = 1; phase < kPhases; ++phase) {
      whole.sum += parts[phase].sum;
      whole.best = better(whole.best, parts[phase].best);
    }
    const int last = stop(path, whole.sum);
    int token = __shfl_sync(kAllLanes, whole.best.token, last);
    bool drawn = __shfl_sync(kAllLanes, whole.sum, last) > kRounding;
    if (path.asked == 0) {
      drawn = last == num_nodes_ - 1;
      if (drawn) token = join_draws(shared_.parts[last], kPhases);
    }
    if (lane_index() == 0) shared_.redraw = drawn ? -1 : last;
    if (drawn) write(last, token);
  }

  // By the first block alone.
  __device__ __forceinline__ void draw_alone(int node) const {
    Partial drawn = {0, -kInfinity, {-1.0f, params_.vocab_size}};
#pragma unroll 1
    for (int tile = warp_index(); tile < params_.slicing.num_tiles; tile += kWarps) {
      float4 x[kVectors];
      load(node, start_of(node), tile, x);
      drawn = join(drawn, draw(x, node, tile), true, sequence_.law.scale);
    }
    Mass* const parts = shared_.parts[0];
    static_assert(kMaxChain * kPhases >= kWarps);
    keep_draw(parts[warp_index()], drawn);
    __syncthreads();
    if (warp_index() == 0) write(node, join_draws(parts, kWarps));
  }

  // What is seldom needed: of a residual nothing was left, or a row that is no law has been drafted from.
  __device__ __noinline__ static void draw_again(Context<kType> context, ChainShared& shared) {
    Chain chain(context, shared);
    chain.load_sequence();
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
        found = (messages[0].number & kPayload) != 0;
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
      const float scale = is_target(row) ? sequence_.law.scale : kLog2e;
      const TileStats next = tile_statistics(x, scale);
      stats = at.is_first() ? next : join(stats, next, scale, false);
      if (at.is_first()) largest = {};
      if (is_target(row)) largest.add(x, (at.tile - at.first) * kTile + lane_index() * 4);
      if (at.is_last()) is_target(row) ? send_list(at, stats.mass, largest) : send_slice(at, stats);
    });
  }

  __device__ __forceinline__ void send_list(const Tiles& at, float mass, const LargestThree& largest) const {
    float others;
    int place = 0;
    const float mine = largest.take<true>(others, place), next = __shfl_down_sync(kAllLanes, mine, 1);
    const int next_place = __shfl_down_sync(kAllLanes, place, 1), kind = lane_index() / 2;
    const bool lists = kind < kListed / 2;
    if (lane_index() % 2 == 0 && kind < kKinds) {
      send(about_slice(kind, at.items.row, context_.slice(at.items.local)),
           lists ? content_of(mine, next) : content_of(mass, others),
           number(lists ? place | next_place << kPlaceBits : 0));
    }
  }

  __device__ __forceinline__ static RowLists& row_lists(int node) {
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    return reinterpret_cast<RowLists*>(dynamic_shared)[node];
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
        const float2 pair = {first_of(messages[i].content), second_of(messages[i].content)};
        if (kind < kKinds - 1) {
          reinterpret_cast<float2*>(&lists.lists.largest[kind / 2][slice(i)])[kind % 2] = pair;
          lists.places[kind][slice(i)] = static_cast<uint32_t>(messages[i].number & kPayload);
        } else {
          lists.lists.rest[slice(i)] = pair;
        }
      }
    }
    __syncwarp();
    bool found = search_lists(lists.lists, num_slices, lists.sequence.law, shared_.stats[node]);
    __syncwarp();
    sequence_ = lists.sequence;  // the call had the registers to itself
    const RowStats stats = shared_.stats[node];
    if (found && stats.valid) found = collect(lists, stats, kept);
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

  // What a row keeps, from the lists of its slices; false if it is too much.
  __device__ __forceinline__ bool collect(RowLists& lists, const RowStats& stats, Kept& kept) const {
    const int num_slices = params_.slicing.num_slices, tokens = params_.slicing.tiles_per_slice * kTile;
    // A list falls, and a row keeps a few of most.
    int mine = 0;
    const auto each = [&](auto use) {
#pragma unroll 1
      for (int slice = lane_index(); slice < num_slices; slice += 32) {
#pragma unroll 1
        for (int i = 0; i < kListed; ++i) {
          const float x = reinterpret_cast<const float*>(&lists.lists.largest[i / 4][slice])[i % 4];
          if (!(stats.weight(sequence_.law.scale, x) > 0)) break;
          const uint32_t pair = lists.places[i / 2][slice];
          use(slice * tokens + static_cast<int>(i % 2 == 0 ? pair & ((1u << kPlaceBits) - 1) : pair >> kPlaceBits), x);
        }
      }
    };
    each([&](int, float) { ++mine; });
    int place = 0;
#pragma unroll
    for (int bit = 1; bit <= kListed * kMaxSlices / 32; bit *= 2) {
      const uint32_t lanes = __ballot_sync(kAllLanes, mine & bit);
      kept.count += bit * __popc(lanes);
      place += bit * __popc(lanes & ((1u << lane_index()) - 1));
    }
    if (kept.count > kMaxKept) return false;
    float* const logits = lists.lists.candidates;
    int* const found = reinterpret_cast<int*>(logits + kMaxKept);
    static_assert(2 * kMaxKept <= 32 * kMany);
    each([&](int token, float x) { found[place] = token, logits[place] = x, ++place; });
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Kept::kMost; ++i) {
      if (32 * i >= kept.count) break;
      const int entry = 32 * i + lane_index();
      const bool inside = entry < kept.count;
      kept.token[i] = inside ? found[entry] : 0;
      kept.p[i] = inside ? stats.weight(sequence_.law.scale, logits[entry]) * stats.inverse_mass : 0.0f;
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
  const int num_nodes_;
  Sequence sequence_;
  int token_;  // lane n: that of node n
};

}  // namespace fastspec
