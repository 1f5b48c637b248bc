// The kernels of verification and their launch, instantiated for each element type in a file of its own: from the
// logits of all tree nodes to the accepted path and the next token. Short chains have a kernel of their own
// (chain.cuh), small trees a way of their own where nothing is cut (tree.cuh); this is the way of all others.
//
// A group of blocks works on one sequence: at batch 1 as many as there are slices of the vocabulary, up to one per
// multiprocessor. A slice is one or more tiles of 512 tokens and belongs to one block, whatever the row, so that a row
// read twice comes from the nearest cache. Blocks talk by messages through device memory (mail.cuh).
//
//   1. read         every warp takes the statistics of slices of the first rows of the tree and sends them to all
//                   blocks; of rows whose law cuts tokens (top-k, top-p, min-p), with each slice's eight largest
//                   logits, to the one block that finds the row's threshold and sends it to all. The draw at
//                   the end of a chain is made beside it
//   2. statistics   each block merges the slices of every row, and each node's thread prepares its test
//   3. walk         the first warp of every block decides the same path from the same numbers (walk.cuh). Where a rule
//                   needs a sum or a draw over the vocabulary the group makes a pass over that row, or over several
//                   at once. Where the path leaves the rows that are known, the next ones are read as in 1.
//   4. output       the first block's walking warp writes
//
// Sums are taken over fixed slices in a fixed order, so results do not depend on the size of the group.

#pragma once

#include <algorithm>

#include "chain.cuh"
#include "context.cuh"
#include "launch.cuh"
#include "tree.cuh"

namespace fastspec {

template <LogitType kType>
__device__ __forceinline__ void load_sequence(const Context<kType>& context, int exchanges) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const int node = static_cast<int>(threadIdx.x), sequence = context.sequence();
  if (node < params.num_nodes) {
    const TreeNode place = params.tree[node];
    shared.penalties.tokens[node] = static_cast<int>(params.tokens[sequence * params.tokens_stride + node]);
    shared.tree[node] = place;
    shared.penalties.parents[node] = place.parent;
    shared.known[node] = Known::kNo;
    shared.next[node] = kMaxNodes;
    shared.drawn[node] = kNotDrawn;
    shared.tests[node] = {0, 0, 0, -1};
  }
  if (threadIdx.x >= kThreads - 160 && threadIdx.x < kThreads - 158) {
    context.open_mailbox(static_cast<int>(threadIdx.x) - (kThreads - 160));
  }
  if (threadIdx.x == kThreads - 128) shared.epoch = *reinterpret_cast<const uint64_t*>(context.header());
  if (threadIdx.x == kThreads - 96) Walk::start(params, shared, exchanges);
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

// A tile of a row of a span: of the target's rows first, then of the draft's.
template <LogitType kType>
__device__ __forceinline__ void load_tile(const Context<kType>& context, const Span& span, int row, int tile,
                                          float4 (&x)[kVectors]) {
  const int num_targets = span.num_targets();
  const bool is_target = row < num_targets;
  if constexpr (kType == LogitType::kFloat) {
    Row<kType> either = context.target_row(is_target ? span.target(row) : 0);
    if (!is_target) either = context.draft_row(span.draft(row - num_targets));
    load_tile(either, tile, x);
  } else {
    is_target ? load_tile(context.target_row(span.target(row)), tile, x)
              : load_tile(context.draft_row(span.draft(row - num_targets)), tile, x);
  }
}

// Whether a row's statistics are of use: a leaf's are not where tokens are drawn from its law as it is.
template <LogitType kType>
__device__ __forceinline__ bool is_read(const Context<kType>& context, int node) {
  const Law& law = context.shared.law;
  return law.greedy || law.cuts || context.shared.tree[node].num_children > 0;
}

// Reads this block's slices of the rows and sends what it finds.
template <LogitType kType>
__device__ __forceinline__ void send_slices(Context<kType> context, int num_rows) {
  const Shared& shared = context.shared;
  const Law& law = shared.law;
  const bool greedy = law.greedy, cuts = law.cuts;
  const Span& span = shared.span;
  const int num_targets = span.num_targets();
  const uint64_t number = context.number();
  const auto wanted = [&](int row) { return row >= num_targets || is_read(context, span.target(row)); };
  const Tiles start(context, num_rows, wanted);
  if (!start.left()) return;
  float4 x[kVectors];
  load_tile(context, span, start.items.row, start.tile, x);
  TileStats stats;
  LargestThree largest;
  read_tiles(
      context, start, x, wanted,
      [&](const Tiles& at, float4(&x)[kVectors]) { load_tile(context, span, at.items.row, at.tile, x); },
      [&](const Tiles& at) {
        const int row = at.items.row;
        const bool is_target = row < num_targets;
        const int place = is_target ? span.target(row) : 0, depth = shared.tree[place].depth;
        const float scale = is_target ? law.scale : kLog2e;
        if (__builtin_expect(is_target && shared.penalties.touch(depth), false)) {
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
            x[j] = penalise(x[j], shared.penalties, lane_token(at.tile, j), place, depth, context.params.vocab_size);
          }
        }
        const TileStats found = greedy ? greedy_statistics(x, at.tile) : tile_statistics(x, scale);
        stats = at.is_first() ? found : join(stats, found, scale, greedy);
        if (cuts && is_target) {
          if (at.is_first()) largest = {};
          largest.add(x, 0);
        }
        if (!at.is_last()) return;
        const int slice = context.slice(at.items.local);
        if (cuts && is_target) {
          const Largest found = largest.take<false>(context.shared.taken[warp_index()]);
          const int kind = lane_index();
          if (kind < kKinds) send(context.about_slice(kind, row, slice), found.content(kind, stats.mass), number);
        } else if (lane_index() == 0) {
          send(context.about_slice(0, row, slice), content_of(stats.maximum, stats.mass), number);
        }
      });
}

// The threshold of a row from all of it, by one block.
template <LogitType kType>
static __device__ __noinline__ RowStats search_row(Context<kType> context, int node) {
  Shared& shared = context.shared;
  const BlockRow<kType, 1> row = {context.target_row(node), &shared.penalties, node, shared.tree[node].depth};
  return cut_statistics(row, shared.law, shared.scratch);
}

// The threshold of a row that is cut, from the lists of its slices or, if these do not suffice, from all of it; by one
// block.
template <LogitType kType>
__device__ __forceinline__ RowStats find_threshold(const Context<kType>& context, int row, int node) {
  constexpr int kMost = (kKinds * kMaxSlices + kThreads - 1) / kThreads;
  Shared& shared = context.shared;
  const int num_slices = context.params.slicing.num_slices;
  const int slice = static_cast<int>(threadIdx.x) % kMaxSlices;
  const auto kind = [](int i) { return (static_cast<int>(threadIdx.x) + i * kThreads) / kMaxSlices; };
  const auto inside = [&](int i) { return kind(i) < kKinds && slice < num_slices; };
  uint64_t contents[kMost];
  const Message* from[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) from[i] = context.about_slice(min(kind(i), kKinds - 1), row, slice);
  receive(contents, context.number(), inside, [&](int i) { return from[i]; });
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (!inside(i)) continue;
    shared.lists.keep(kind(i), slice, {first_of(contents[i]), second_of(contents[i])});
  }
  __syncthreads();
  if (warp_index() == 0) {
    const int candidates = search_lists(shared.lists, num_slices, shared.law, shared.cut);
    if (lane_index() == 0) shared.cut_found = candidates != kNotTold;
  }
  __syncthreads();
  RowStats stats = shared.cut;
  if (!shared.cut_found) {
    stats = search_row(context, node);
    __syncthreads();  // before the lists of the next row come where it worked
  }
  return stats;
}

// Merges the slices of the rows from `first` on into their statistics, kRows rows of a warp at a time, of each of which
// a lane receives up to kCount slices.
template <int kRows, int kCount, LogitType kType>
__device__ __forceinline__ void merge_rows(const Context<kType>& context, int first, int num_rows) {
  Shared& shared = context.shared;
  const Span& span = shared.span;
  const Law& law = shared.law;
  const bool greedy = law.greedy;
  const int num_targets = span.num_targets(), num_slices = context.params.slicing.num_slices;
#pragma unroll 1
  for (int start = first + warp_index(); start < num_rows; start += kRows * kWarps) {
    const auto row = [&](int r) { return start + r * kWarps; };
    const auto is_target = [&](int r) { return row(r) < num_targets; };
    bool wanted[kRows];
    const Message* from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      wanted[r] = row(r) < num_rows && !(is_target(r) && !is_read(context, span.target(row(r))));
      from[r] = context.about_slice(0, row(r), lane_index());
    }
    const auto inside = [&](int i) { return wanted[i / kCount] && lane_index() + 32 * (i % kCount) < num_slices; };
    uint64_t contents[kRows * kCount];
    receive(contents, context.number(), inside, [&](int i) { return from[i / kCount] + 32 * (i % kCount); });
    RowStats stats[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      stats[r] = merge_contents<kCount>([&](int i) { return contents[r * kCount + i]; },
                                        [&](int i) { return inside(r * kCount + i); },
                                        is_target(r) ? law.scale : kLog2e, greedy);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!wanted[r] || lane_index() != 0) continue;
      const int place =
          is_target(r) ? span.target(row(r)) : context.params.num_nodes + span.draft(row(r) - num_targets);
      shared.stats[place] = stats[r];
    }
  }
}

// A warp's part of a slice, of a row whose statistics are known or, kBare, of its law as it is.
template <bool kBare, LogitType kType>
__device__ __forceinline__ Partial pass_over(const Context<kType>& context, const Request& request, int slice,
                                             int phase) {
  const VerifyParams& params = context.params;
  const Shared& shared = context.shared;
  const float scale = shared.law.scale, c = request.c;
  const bool subtract = !kBare && c > 0;
  const Row<kType> row = context.target_row(request.node);
  const int inner_row = subtract ? shared.tree[request.node].inner_row : 0;
  const DraftRow other = context.draft_row(inner_row);
  const bool vector = row.vectors(), other_vector = other.vectors();
  RowStats stats = {0.0f, -kInfinity, 0.0f, 1.0f, 0, true}, other_stats = stats;
  if (!kBare) stats = shared.stats[request.node];
  if (subtract) other_stats = shared.stats[params.num_nodes + inner_row];
  const float p_scale = request.a * stats.inverse_mass;
  const int depth = shared.tree[request.node].depth;
  const bool penalised = shared.penalties.touch(depth);
  NoiseKey key = context.key(request.stream, request.node);
  if (request.stream == Stream::kCoupled) {
    key = context.key(Stream::kCoupled, 0);
    key.position += depth;
  }
  Partial result = no_part(kBare, params.vocab_size);
#pragma unroll 1
  for (int i = 0; i < context.params.slicing.tiles_per_slice; ++i) {
    const int tile = slice * context.params.slicing.tiles_per_slice + i;
    const int first = tile * kTile + phase * kPhase + lane_index() * 4;
    float4 x = row.load(first, vector), y = {};
    if (subtract) y = other.load(first, other_vector);
    if (__builtin_expect(penalised, false)) {
      x = penalise(x, shared.penalties, first, request.node, depth, params.vocab_size);
    }
    Partial found = no_part(kBare, params.vocab_size);
    if (kBare) {
      found.left = warp_max(fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
      stats.maximum = found.left > -kInfinity ? found.left : 0.0f;
    }
    const auto weight = [&](float logit) { return stats.weight(scale, logit) * p_scale; };
    float w[4] = {weight(x.x), weight(x.y), weight(x.z), weight(x.w)};
    if (subtract) {
      const float logits[4] = {y.x, y.y, y.z, y.w};
      float q[4], taken[4], kept[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        q[j] = kept[j] = exp2_fast((logits[j] - other_stats.maximum) * kLog2e) * other_stats.inverse_mass;
        taken[j] = c;
      }
#pragma unroll 1
      for (int k = 0; k < request.num_removed; ++k) {
        const int place = shared.removed_token[k] - first;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (place == j) taken[j] = shared.removed_scale[k], kept[j] = 0;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = fmaxf(fmaf(-taken[j], q[j], w[j]), 0.0f);
      found.left = (kept[0] + kept[1]) + (kept[2] + kept[3]);
    }
    const float sum = (w[0] + w[1]) + (w[2] + w[3]);
    if (!kBare) found.sum = sum;
    // Nobody has looked at a bare row before; its maximum and weights pass over a NaN.
    if (kBare && (!(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity))) found.sum = NAN;
    if (request.race && sum > 0) {
      race(w, first, exponentials<true>(key, static_cast<uint32_t>(first) / 4), found.best);
    }
    result = i == 0 ? found : join(result, found, kBare, scale);
  }
  if (request.race) return draw_of_warp(result, kBare);
  result.sum = warp_sum(result.sum), result.left = warp_sum(result.left);
  return result;
}

// A warp's part of a slice, to all: its sums and, if there is a race, who has won.
template <LogitType kType>
__device__ __forceinline__ void send_part(const Context<kType>& context, const Partial& part, bool race, int index,
                                          int phase, int slice) {
  const int kind = lane_index();
  if (kind > static_cast<int>(race)) return;
  send(context.about_part(kind, index, phase, slice),
       kind == 0 ? content_of(part.sum, part.left) : content_of(part.best.score, __int_as_float(part.best.token)),
       context.number());
}

// What a phase of all slices has found, by a warp.
template <LogitType kType>
__device__ __forceinline__ void receive_part(const Context<kType>& context, bool bare, bool race, int index,
                                             int phase) {
  constexpr int kAtOnce = 2;  // slices of a lane
  const int num_slices = context.params.slicing.num_slices;
  const float scale = context.shared.law.scale;
  Partial found = no_part(bare, context.params.vocab_size);
#pragma unroll 1
  for (int first = lane_index(); first - lane_index() < num_slices; first += 32 * kAtOnce) {
    uint64_t contents[2 * kAtOnce];
    const auto slice = [&](int i) { return first + 32 * (i % kAtOnce); };
    const Message* const from[2] = {context.about_part(0, index, phase, first),
                                    context.about_part(race, index, phase, first)};
    receive(
        contents, context.number(), [&](int i) { return slice(i) < num_slices; },
        [&](int i) { return from[i / kAtOnce] + 32 * (i % kAtOnce); });
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (slice(i) >= num_slices) continue;
      const uint64_t best = contents[kAtOnce + i];
      found = join(found,
                   {first_of(contents[i]), second_of(contents[i]), {first_of(best), __float_as_int(second_of(best))}},
                   bare, scale);
    }
  }
  if (race) {
    found = draw_of_lanes(found, bare, scale);
  } else {
    found.sum = warp_sum(found.sum), found.left = warp_sum(found.left);
  }
  if (lane_index() == 0) context.shared.parts[index][phase] = found;
}

// What the phases have found together: of so many requests from one on, by a warp.
template <LogitType kType>
__device__ __forceinline__ void join_parts(const Context<kType>& context, bool bare, int first, int count) {
  Shared& shared = context.shared;
  const float scale = shared.law.scale;
  const int index = first + min(lane_index() / kPhases, count - 1), phase = lane_index() % kPhases;
  Partial whole = shared.parts[index][phase];
#pragma unroll
  for (int step = 1; step < kPhases; step *= 2) {
    const Partial other = {
        __shfl_down_sync(kAllLanes, whole.sum, step),
        __shfl_down_sync(kAllLanes, whole.left, step),
        {__shfl_down_sync(kAllLanes, whole.best.score, step), __shfl_down_sync(kAllLanes, whole.best.token, step)}};
    whole = join(whole, other, bare, scale);
  }
  if (bare && !is_law(whole)) whole.best.token = -1;
  if (lane_index() < kPhases * count && phase == 0) shared.found[index] = whole;
  __syncwarp();
}

// The whole group's passes over rows, which are alike; what they have found goes to the walking warp. False if the walk
// ends with that and this block is not the one that says so.
template <LogitType kType>
__device__ __forceinline__ bool pass(const Context<kType>& context) {
  static_assert(kTeams == kMaxRequests);
  const Shared& shared = context.shared;
  const int team = warp_index() / kPhases, phase = warp_index() % kPhases, num_requests = shared.num_requests;
  const bool bare = shared.requests[0].bare, race = shared.requests[0].race;
#pragma unroll 1
  for (Items items(team, kTeams, context.num_local()); items.row < num_requests; items.advance()) {
    const int index = items.row, slice = context.slice(items.local);
    const Request request = shared.requests[index];
    const Partial part =
        bare ? pass_over<true>(context, request, slice, phase) : pass_over<false>(context, request, slice, phase);
    send_part(context, part, race, index, phase, slice);
  }
  if (context.rank() != 0 && shared.walk.phase == Phase::kLastDraw) return false;
  if (team < num_requests) receive_part(context, bare, race, team, phase);
  __syncthreads();
  if (warp_index() == 0) join_parts(context, bare, 0, num_requests);
  return true;
}

// The draw at the end of a chain is made with the first read, where drafts are good the one that is needed most: from
// the law as it is, it needs no statistics. The teams begin with the one that has the fewest rows.
template <LogitType kType>
__device__ __forceinline__ void send_last(const Context<kType>& context) {
  const int team = warp_index() / kPhases, phase = warp_index() % kPhases;
  const Request request = {context.params.num_nodes - 1, 1.0f, 0.0f, 0, true, true, Stream::kEmit};
#pragma unroll 1
  for (Items items(kTeams - 1 - team, kTeams, context.num_local()); items.row == 0; items.advance()) {
    const int slice = context.slice(items.local);
    send_part(context, pass_over<true>(context, request, slice, phase), true, kLastRequest, phase, slice);
  }
}

// What is read of a span: no row where tokens are drawn from the target's laws as they are.
template <LogitType kType>
__device__ __forceinline__ int num_rows_read(const Context<kType>& context) {
  const Law& law = context.shared.law;
  const Span& span = context.shared.span;
  const bool with_draft = weighs_draft(context.params, context.shared);
  if (!law.greedy && !law.cuts && !with_draft) return 0;
  return span.num_targets() + (with_draft ? span.num_drafts() : 0);
}

// What is known of a node's test before statistics are.
struct Drafted {
  int token = -1, parent = 0;  // -1: there is none, or the span does not hold its parent
  float target_logit = 0, draft_logit = 0, uniform = 0;
};

template <LogitType kType>
__device__ __forceinline__ Drafted load_drafted(const Context<kType>& context, int node) {
  const VerifyParams& params = context.params;
  const Shared& shared = context.shared;
  Drafted drafted;
  if (node <= 0 || node >= params.num_nodes) return drafted;
  drafted.parent = shared.penalties.parents[node];
  const int token = shared.penalties.tokens[node];
  if (!shared.span.holds(drafted.parent) || token < 0 || token >= params.vocab_size) return drafted;
  drafted.token = token;
  if (weighs_draft(params, shared)) {
    drafted.target_logit = context.target_row(drafted.parent)[token];
    drafted.draft_logit = context.draft_row(shared.tree[drafted.parent].inner_row)[token];
    drafted.uniform = accept_uniform(context.key(Stream::kAccept, node));
  }
  return drafted;
}

// From the statistics of a node's parent to its test, or to where the argmax leads.
template <LogitType kType>
__device__ __forceinline__ void prepare_test(const Context<kType>& context, int node, const Drafted& drafted) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const Law& law = shared.law;
  const int parent = drafted.parent;
  const RowStats row = shared.stats[parent];
  if (law.greedy) {
    if (row.valid && row.argmax == drafted.token) atomicMin(&shared.next[parent], node);
  } else if (weighs_draft(params, shared)) {
    const RowStats other = shared.stats[params.num_nodes + shared.tree[parent].inner_row];
    const int depth = shared.tree[parent].depth;
    float logit = drafted.target_logit;
    if (__builtin_expect(shared.penalties.touch(depth), false)) {
      logit = penalise({logit}, shared.penalties, drafted.token, parent, depth, params.vocab_size).x;
    }
    const float p = row.weight(law.scale, logit) * row.inverse_mass;
    const float q = other.weight(kLog2e, drafted.draft_logit) * other.inverse_mass;
    if (row.valid && other.valid) shared.tests[node] = {p, q, drafted.uniform, drafted.token};
  }
}

// Statistics of the rows of a span, and the tests of the children of its nodes.
template <LogitType kType>
__device__ __forceinline__ void read(const Context<kType>& context) {
  const VerifyParams& params = context.params;
  Shared& shared = context.shared;
  const Span& span = shared.span;
  const Law& law = shared.law;
  const bool cuts = law.cuts;
  const int num_targets = span.num_targets(), num_rows = num_rows_read(context);

  send_slices(context, num_rows);
  if (context.draws_last()) send_last(context);
  context.note_first(Mark::kRead);
  if (cuts) {
#pragma unroll 1
    for (int row = context.rank(); row < num_targets; row += context.group_size()) {
      const RowStats stats = find_threshold(context, row, span.target(row));
      if (threadIdx.x == 0) {
        send(context.about_row(0, row), content_of(stats.maximum, stats.threshold), context.number());
        send(context.about_row(1, row), content_of(stats.inverse_mass, stats.valid ? 1.0f : 0.0f), context.number());
      }
    }
  }
  // The last warps have the fewest rows to receive.
  const int node = kThreads - 1 - static_cast<int>(threadIdx.x);
  const Drafted drafted = load_drafted(context, node);
  const int first = cuts ? num_targets : 0;
  if (params.slicing.num_slices > 64) {
    merge_rows<1, 4>(context, first, num_rows);
  } else if (num_rows - first > kWarps) {
    merge_rows<2, 2>(context, first, num_rows);
  } else {
    merge_rows<1, 2>(context, first, num_rows);
  }
  const bool draws_last = context.draws_last();
  if (draws_last && warp_index() >= kWarps - kPhases) {
    receive_part(context, true, true, kLastRequest, warp_index() % kPhases);
  }
  if (cuts && __any_sync(kAllLanes, node < num_targets)) {
    uint64_t contents[2];
    const bool inside = node < num_targets;
    const Message* const from[2] = {context.about_row(0, inside ? node : 0), context.about_row(1, inside ? node : 0)};
    receive(contents, context.number(), [&](int) { return inside; }, [&](int i) { return from[i]; });
    if (inside) {
      shared.stats[span.target(node)] = {
          first_of(contents[0]),     second_of(contents[0]), law.min_p, first_of(contents[1]), 0,
          second_of(contents[1]) > 0};
    }
  }
  __syncthreads();
  if (num_rows > 0) {
    if (node < params.num_nodes && span.holds(node) && is_read(context, node)) {
      shared.known[node] = shared.stats[node].valid ? Known::kYes : Known::kInvalid;
    }
    if (drafted.token >= 0) prepare_test(context, node, drafted);
    __syncthreads();
  }
  if (draws_last && warp_index() == 0) join_parts(context, true, kLastRequest, 1);
  context.note_first(Mark::kStatistics);
}

// By one warp.
__device__ __forceinline__ void write(const VerifyParams& params, const Shared& shared, int sequence) {
  const Decision decision = shared.walk.decision;
  const int depth = shared.tree[decision.stop].depth;
  const bool invalid = shared.known[decision.stop] == Known::kInvalid;
  if (lane_index() == 0) {
    params.num_accepted[sequence] = depth;
    params.next_token[sequence] = invalid ? -1 : decision.next;
    params.invalid[sequence] = invalid;
  }
#pragma unroll 1
  for (int place = lane_index(); place <= params.max_depth; place += 32) {
    int node = decision.stop;
#pragma unroll 1
    for (int above = depth; above > place; --above) node = shared.penalties.parents[node];
    params.path[static_cast<int64_t>(sequence) * (params.max_depth + 1) + place] = node;
  }
}

// The walk over a tree whose sequence has been loaded.
template <LogitType kType>
__device__ __forceinline__ void verify_tree(const Context<kType>& context) {
  Shared& shared = context.shared;
  do {
    if (shared.walk.need == Need::kRead) {
      read(context);
    } else if (!pass(context)) {
      return;
    }
    if (warp_index() == 0) {
      const Need need = Walk(context.params, shared).resume();
      if (context.rank() == 0 && need == Need::kNothing) {
        context.note(Mark::kWalk);
        write(context.params, shared, context.sequence());
        // All blocks have sent something, so all have seen the old number.
        if (lane_index() == 0) context.header()->content = context.launch();
      }
    }
    __syncthreads();
  } while (shared.walk.need != Need::kNothing);
  context.note(Mark::kEnd);
}

// The same as a call, which reads the parameters from shared memory. Inlined beside the way of a chain, it would be
// short of registers.
template <LogitType kType>
static __device__ __noinline__ void verify_as_tree(const VerifyParams& params, Shared& shared, int exchanges) {
  __builtin_assume(__isShared(&params));
  __builtin_assume(__isShared(&shared));
  const Context<kType> context(params, shared);
  load_sequence(context, exchanges);
  __syncthreads();
  verify_tree(context);
}

// A copy of the parameters in shared memory, by all threads, for functions that are called: these would read them
// through the L2 cache.
struct alignas(VerifyParams) ParamsCopy {
  static constexpr int kWords = sizeof(VerifyParams) / sizeof(uint32_t);
  uint32_t words[kWords];

  __device__ __forceinline__ void take(const VerifyParams& params) {
    if (threadIdx.x < kWords) words[threadIdx.x] = reinterpret_cast<const uint32_t*>(&params)[threadIdx.x];
  }
  __device__ __forceinline__ const VerifyParams& get() const { return reinterpret_cast<const VerifyParams&>(words); }
};

// The way of small trees as a call: inlined, it would take registers from the other.
template <LogitType kType>
static __device__ __noinline__ void verify_small_tree(const VerifyParams& params, Shared& shared, TreeShared& own) {
  __builtin_assume(__isShared(&params));
  __builtin_assume(__isShared(&shared));
  __builtin_assume(__isShared(&own));
  const Context<kType> context(params, shared);
  SmallTree<kType>(context, own).verify();
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_kernel(const __grid_constant__ VerifyParams params) {
  __shared__ Shared shared;
  __shared__ TreeShared tree_shared;
  __shared__ ParamsCopy copy;
  const Context<kType> context(params, shared);
  if (params.is_small) copy.take(params);
  wait_for_inputs();
  context.note(Mark::kStart);
  load_sequence(context, 0);
  __syncthreads();
  if (is_small(params, shared)) {
    verify_small_tree<kType>(copy.get(), shared, tree_shared);
  } else {
    verify_tree(context);
  }
}

template <LogitType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_chain_kernel(const __grid_constant__ VerifyParams params) {
  __shared__ Shared shared;
  __shared__ ChainShared chain_shared;
  const Context<kType> context(params, shared);
  const int exchanges = Chain<kType>(context, chain_shared).verify();
  if (exchanges == kDecided) return;
  __shared__ ParamsCopy copy;
  copy.take(params);
  __syncthreads();
  verify_as_tree<kType>(copy.get(), shared, exchanges);
}

template <LogitType kType>
int launch_verify(const VerifyParams& params, void* stream) {
  static_assert(sizeof(TreeNode) == 32);
  // Every block of a group must have a slice.
  const int group_size = std::min(params.group_size, params.slicing.num_slices);
  VerifyParams launched = params;
  // At the end of a chain that is read at once.
  launched.draws_last = reads_chain(params);
  // As long as there is shared memory for its lists, which the function is allowed once and for all.
  constexpr int kOther = sizeof(Shared) + sizeof(ChainShared) + sizeof(VerifyParams) + 256;
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOther;
  const int longest = std::min(kMaxChain, most / static_cast<int>(sizeof(RowLists)));
  const bool chain = is_chain(params) && params.num_nodes <= longest;
  launched.is_small = is_small_tree(params);
  launched.is_small_rejection = is_small_rejection_tree(params);
  launched.max_local = (params.slicing.num_slices + group_size - 1) / group_size;
  // From sm_90 on the blocks are set up while the kernel before comes to its end, and wait for it (griddepcontrol).
  const bool starts_early = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const auto kernel = chain ? verify_chain_kernel<kType> : verify_kernel<kType>;
  if (chain) {
    const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     longest * static_cast<int>(sizeof(RowLists)));
    if (allowed != cudaSuccess) return allowed;
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(group_size, params.batch_size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = chain ? params.num_nodes * sizeof(RowLists) : 0;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (starts_early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (group_size > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;  // blocks of a group wait for each other
  }
  return cudaLaunchKernelEx(&config, kernel, launched);
}

}  // namespace fastspec
