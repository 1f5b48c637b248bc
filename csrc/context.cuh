// What the blocks of a group share on their way through a verification: their slices, their rows, their mailbox.
#pragma once

#include "listed.cuh"
#include "mail.cuh"
#include "params.h"
#include "philox.cuh"
#include "ptx.cuh"
#include "rows.cuh"
#include "walk.cuh"

namespace fastspec {

constexpr int kTeams = kWarps / kPhases;
constexpr int kPhase = kTile / kPhases;  // tokens of a tile that each takes, four per lane
constexpr int kKinds = kListed / 2 + 1;  // messages about a slice of a row that is cut; else it is one

// What all functions below share.
template <LogitType kType>
struct Context {
  const VerifyParams& params;
  Shared& shared;

  __device__ __forceinline__ Context(const VerifyParams& params, Shared& shared) : params(params), shared(shared) {}

  // Of the groups, and of the blocks of the group.
  __device__ __forceinline__ int sequence() const { return static_cast<int>(blockIdx.y); }
  __device__ __forceinline__ int rank() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ int group_size() const { return static_cast<int>(gridDim.x); }

  // The slices of this block: rank, rank + group_size, ...
  __device__ __forceinline__ int slice(int local) const { return rank() + local * group_size(); }
  __device__ __forceinline__ int num_local() const {
    return slice(params.max_local - 1) < params.slicing.num_slices ? params.max_local : params.max_local - 1;
  }

  __device__ __forceinline__ Row<kType> target_row(int node) const {
    return {params.target_logits, (static_cast<int64_t>(sequence()) * params.num_nodes + node) * params.target_stride,
            params.vocab_size};
  }
  __device__ __forceinline__ DraftRow draft_row(int inner_row) const {
    return {params.draft_logits, (static_cast<int64_t>(sequence()) * params.num_inner + inner_row) * params.vocab_size,
            params.vocab_size};
  }
  __device__ __forceinline__ NoiseKey key(Stream stream, int node) const {
    return noise_key(shared.seed, shared.position, stream, node);
  }

  // The group's mailbox. Of what is sent again and again there are two halves, used in turn: a block sends for the next
  // exchange but one when it has had the next one's messages from all others, so nobody still waits for the last one's.
  // Where they lie is kept in shared memory: the compiler would keep it in registers otherwise, and spill others.
  __device__ __forceinline__ Message* header() const {  // how many launches there have been
    return static_cast<Message*>(params.mail) + sequence() * params.mail_size;
  }
  __device__ __forceinline__ void open_mailbox(int half) const {
    const int slices = params.slicing.num_slices;
    Message* const all = header() + 1;
    Message* const about_rows = all + 2 * kKinds * params.mail_rows * slices;
    Message* const about_parts = about_rows + 4 * params.mail_rows;
    shared.mail[half] = {all + half * kKinds * params.mail_rows * slices, about_rows + half * 2 * params.mail_rows,
                         about_parts + half * 2 * kNumRequests * kPhases * slices};
  }
  __device__ __forceinline__ Message* about_slice(int kind, int row, int slice) const {
    return shared.mail[half()].slices + ((kind * params.mail_rows + row) * params.slicing.num_slices + slice);
  }
  __device__ __forceinline__ Message* about_row(int kind, int row) const {
    return shared.mail[half()].rows + (kind * params.mail_rows + row);
  }
  __device__ __forceinline__ Message* about_part(int kind, int request, int phase, int slice) const {
    return shared.mail[half()].parts +
           (((kind * kNumRequests + request) * kPhases + phase) * params.slicing.num_slices + slice);
  }
  // Whether the draw after the last node is made with this read.
  __device__ __forceinline__ bool draws_last() const {
    return params.draws_last && shared.walk.reads == 0 && !shared.law.greedy && !shared.law.cuts;
  }
  // Which launch of the group this is.
  __device__ __forceinline__ uint64_t launch() const { return shared.epoch + 1; }
  // The number of the exchange that is under way, and which half it uses.
  __device__ __forceinline__ uint64_t number() const {
    return exchange_number(launch(), shared.walk.reads + shared.walk.passes);
  }
  __device__ __forceinline__ int half() const {
    return (shared.walk.need == Need::kRead ? shared.walk.reads : shared.walk.passes) & 1;
  }

  __device__ __forceinline__ void note(Mark mark) const {
    if (params.clock != nullptr && rank() == 0 && sequence() == 0 && threadIdx.x == 0) {
      params.clock[static_cast<int>(mark)] = clock64();
    }
  }
  // Of what may come again; the first thread asks alone, as it counts the reads itself. Volatile, or the compiler would
  // let all threads ask.
  __device__ __forceinline__ void note_first(Mark mark) const {
    if (threadIdx.x == 0 && const_cast<const volatile int&>(shared.walk.reads) == 0) note(mark);
  }
};

// The slices of this block in some rows, one after the other, dealt to a number of workers in turn. No division: it
// would take longer than the work itself.
struct Items {
  int row, local, num_local, num_workers;

  __device__ __forceinline__ Items(int worker, int num_workers, int num_local)
      : row(0), local(worker), num_local(num_local), num_workers(num_workers) {
    settle();
  }
  __device__ __forceinline__ void advance() { local += num_workers, settle(); }

 private:
  __device__ __forceinline__ void settle() {
    if (num_local == 1) {
      row += local, local = 0;
    } else {
#pragma unroll 1
      for (; local >= num_local; local -= num_local) ++row;
    }
  }
};

// The tiles of this block's slices of some rows, one after the other, dealt to the warps.
struct Tiles {
  Items items;
  int num_rows, tile, first, end;

  // Of the rows that are `wanted`.
  template <typename Context, typename Wanted>
  __device__ __forceinline__ Tiles(const Context& context, int num_rows, Wanted wanted)
      : items(warp_index(), kWarps, context.num_local()), num_rows(num_rows) {
    settle(context, wanted);
  }
  __device__ __forceinline__ bool left() const { return items.row < num_rows; }
  // Of its slice.
  __device__ __forceinline__ bool is_first() const { return tile == first; }
  __device__ __forceinline__ bool is_last() const { return tile + 1 == end; }

  template <typename Context, typename Wanted>
  __device__ __forceinline__ void advance(const Context& context, Wanted wanted) {
    if (!is_last()) {
      ++tile;
    } else {
      items.advance();
      settle(context, wanted);
    }
  }

 private:
  template <typename Context, typename Wanted>
  __device__ __forceinline__ void settle(const Context& context, Wanted wanted) {
#pragma unroll 1
    while (left() && !wanted(items.row)) items.advance();
    const Slicing& slicing = context.params.slicing;
    tile = first = context.slice(items.local) * slicing.tiles_per_slice;
    end = min(first + slicing.tiles_per_slice, slicing.num_tiles);
  }
};

// Lets `use(at)` have the tiles one by one in x, where the first is; the next one is under way meanwhile.
template <typename Context, typename Wanted, typename Load, typename Use>
__device__ __forceinline__ void read_tiles(const Context& context, Tiles at, float4 (&x)[kVectors], Wanted wanted,
                                           Load load, Use use) {
  float4 following[kVectors];
#pragma unroll 1
  for (bool left = true; left;) {
    Tiles next = at;
    next.advance(context, wanted);
    left = next.left();
    if (left) load(next, following);
    use(at);
    at = next;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = following[j];
  }
}

template <LogitType kType>
__device__ __forceinline__ void load_tile(const Row<kType>& row, int tile, float4 (&x)[kVectors]) {
  if (__builtin_expect(row.vectors(), true)) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = row.load_vector(lane_token(tile, j));
  } else {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = row.load(lane_token(tile, j), false);
  }
}

// What a warp has taken from its lanes, in descending order.
struct Largest {
  const Taken* taken;
  int count;
  float others;  // no less than all that was not taken

  __device__ __forceinline__ float logit(int i) const {
    return i < count ? from_ordered_key(taken[i].key) : -kInfinity;
  }
  __device__ __forceinline__ uint32_t place(int i) const { return i < count ? taken[i].place : 0; }
  // Of the message of that kind, about a slice of that mass.
  __device__ __forceinline__ uint64_t content(int kind, float mass) const {
    return kind < kListed / 2 ? content_of(logit(2 * kind), logit(2 * kind + 1)) : content_of(mass, others);
  }
};

// A lane's share of a slice, of which the largest logits of all lanes are taken one by one. A lane keeps its first
// three; if all of them are taken, what it knows of the next is that the third was no less.
struct LargestThree {
  float first = -kInfinity, second = -kInfinity, third = -kInfinity;
  int first_place = 0, second_place = 0, third_place = 0;

  __device__ __forceinline__ void add(float x, int place) {
    const bool above_first = x > first, above_second = x > second, above_third = x > third;
    third_place = above_second ? second_place : above_third ? place : third_place;
    second_place = above_first ? first_place : above_second ? place : second_place;
    first_place = above_first ? place : first_place;
    const float rest = fminf(first, x);
    first = fmaxf(first, x);
    const float least = fminf(second, rest);
    second = fmaxf(second, rest);
    third = fmaxf(third, least);
  }
  // Four logits of each vector, whose places in the slice begin at `place`.
  __device__ __forceinline__ void add(const float4 (&x)[kVectors], int place) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j, place += kTile / kVectors) {
      add(x[j].x, place), add(x[j].y, place + 1), add(x[j].z, place + 2), add(x[j].w, place + 3);
    }
  }

  // Up to eight of the largest of all lanes.
  template <bool kPlaces>
  __device__ __forceinline__ Largest take(Taken (&taken)[kListed]) const {
    uint32_t key = ordered_key(first), next = ordered_key(second), bound = 0;
    int place = first_place, next_place = second_place;
    int left = 3;  // of this lane; when all are taken the third remains, as a bound
    int count = 0;
    bool ended = false;
    __syncwarp();  // all have read what was taken before
    // All lanes that have the largest lose it at once, so that a turn waits for one reduction; what it means follows.
#pragma unroll 3
    for (int i = 0; i <= kListed; ++i) {
      const uint32_t top = __reduce_max_sync(kAllLanes, key);
      const bool holds = key == top;
      const uint32_t holders = __ballot_sync(kAllLanes, holds),
                     exhausted = __ballot_sync(kAllLanes, holds && left == 0);
      const int slot = count + num_before(holders), all = count + __popc(holders);
      if (!ended) bound = top;
      const bool taking = holds && !ended && exhausted == 0 && slot < kListed;
      if (taking) taken[slot] = {key, kPlaces ? place : 0};
      if (!ended && exhausted == 0) count = min(all, kListed);
      ended = ended || exhausted != 0 || all > kListed;
      if (holds) {
        key = next, next = ordered_key(third), place = next_place, next_place = third_place;
        left = max(left - 1, 0);
      }
    }
    __syncwarp();
    return {taken, count, from_ordered_key(bound)};
  }
};

// The statistics of a whole slice so far and of its next tile.
__device__ __forceinline__ TileStats join(TileStats before, TileStats next, float scale, bool greedy) {
  const float maximum = fmaxf(before.maximum, next.maximum);
  if (greedy) {
    const int a = __float_as_int(before.mass), b = __float_as_int(next.mass);
    const bool bad = a < 0 || b < 0;
    const int token = before.maximum == next.maximum ? min(a, b) : before.maximum > next.maximum ? a : b;
    return {maximum, __int_as_float(bad ? -1 : token)};
  }
  const auto part = [&](TileStats stats) {
    return stats.maximum > -kInfinity || isnan(stats.mass) ? stats.mass * exp2_fast((stats.maximum - maximum) * scale)
                                                           : 0.0f;
  };
  return {maximum, part(before) + part(next)};
}

// Statistics of a row from what messages say of its slices, of which each lane has some; by one warp.
template <int kCount, typename Content, typename Inside>
__device__ __forceinline__ RowStats merge_contents(Content content, Inside inside, float scale, bool greedy) {
  TileStats slices[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    slices[i] = {-kInfinity, 0.0f};
    if (inside(i)) slices[i] = {first_of(content(i)), second_of(content(i))};
  }
  return merge_slices(slices, scale, greedy);
}

// Two parts of a row together; the second is of later tokens.
__device__ __forceinline__ Partial join(Partial a, Partial b, bool bare, float scale) {
  if (!bare) return {a.sum + b.sum, a.left + b.left, better(a.best, b.best)};
  const float maximum = fmaxf(a.left, b.left);
  const float share_a = a.left > -kInfinity ? exp2_fast((a.left - maximum) * scale) : 0.0f;
  const float share_b = b.left > -kInfinity ? exp2_fast((b.left - maximum) * scale) : 0.0f;
  a.best.score *= share_a, b.best.score *= share_b;
  return {a.sum + b.sum, maximum, better(a.best, b.best)};
}

// A draw from what the lanes of a warp have of a row, whose scores are relative to one maximum.
__device__ __forceinline__ Partial draw_of_warp(Partial found, bool bare) {
  found.sum = !bare ? warp_sum(found.sum) : __all_sync(kAllLanes, found.sum < kInfinity) ? 0.0f : NAN;
  found.best = warp_best(found.best);
  return found;
}
// The same, each lane's relative to a maximum of its own.
__device__ __forceinline__ Partial draw_of_lanes(Partial found, bool bare, float scale) {
  if (bare) {
    const float maximum = warp_max(found.left);
    found.best.score *= found.left > -kInfinity ? exp2_fast((found.left - maximum) * scale) : 0.0f;
    found.left = maximum;
  }
  return draw_of_warp(found, bare);
}

// Of a bare draw: whether there is a law to draw from.
__device__ __forceinline__ bool is_law(const Partial& drawn) {
  return drawn.sum < kInfinity && drawn.left > -kInfinity;
}

constexpr uint32_t kNoLaw = kPayload;  // in place of a token: the row has a NaN or +inf

// A draw as a message whose payload is its token. Of the mass of a bare one no more is told than whether there is a
// law.
__device__ __forceinline__ void send_drawn(Message* to, const Partial& drawn, bool bare, uint64_t launch) {
  const uint32_t token = drawn.sum < kInfinity ? static_cast<uint32_t>(drawn.best.token) : kNoLaw;
  send(to, content_of(bare ? drawn.left : drawn.sum, drawn.best.score), payload_number(launch, token));
}
__device__ __forceinline__ Partial drawn_of(const Message& message, bool bare) {
  const uint32_t token = payload_of(message);
  const float value = first_of(message.content), sum = bare ? 0.0f : value;
  return {token == kNoLaw ? NAN : sum, bare ? value : 0.0f, {second_of(message.content), static_cast<int>(token)}};
}

// No part of a row.
__device__ __forceinline__ Partial no_part(bool bare, int vocab_size) {
  return {0, bare ? -kInfinity : 0.0f, {-1.0f, vocab_size}};
}

}  // namespace fastspec
