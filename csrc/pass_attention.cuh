// Attention of the rows of a pass over the static cache.
//
// The row at position p sees the whole prefix and, of the rows after it, those that the tree shows it: one per
// position. Its keys are cut by position, never by where the prefix ends, so that a token gets the same bits however it
// came:
//
//   far    positions below B(p) = 16 floor(max(p - 16, 0) / 16), always inside the prefix, in groups of 16 keys. Groups
//          go round the splits, and within a split round the warps; products on tensor cores, streamed by the producer.
//   near   positions B(p) to p, at most 32, in four parts of 8: a warp for a part of a row and a head, in single
//          precision.
//
// A block takes a split of the keys of one head of the cache, for tiles of 16 pairs of a row and a query head. The last
// block to finish a tile merges the splits and the near parts, in that order.
#pragma once

#include "pass.cuh"
#include "pass_linear.cuh"

#if FASTSPEC_CLUSTERS

namespace fastspec {

constexpr int kNearKeys = 8;  // of a part

// Groups of far keys of the row at a position.
__device__ __forceinline__ int far_groups(int position) { return max(position - kKeyGroup, 0) / kKeyGroup; }

// A block's share of attention: the split of the keys of one head of one sequence.
struct AttentionUnit {
  int sequence, head, split;
  int groups;  // far groups of the last row
  int64_t line;  // of the cache: row 0 of this head

  __device__ __forceinline__ AttentionUnit(const PassParams& params, const PassShared& shared, int layer, int unit) {
    const int line_index = unit / params.num_splits;
    split = unit % params.num_splits;
    sequence = line_index / params.num_kv_heads;
    head = line_index % params.num_kv_heads;
    groups = far_groups(shared.prefix[sequence] + params.max_visible - 1);
    line = static_cast<int64_t>(layer * params.batch_size * params.num_kv_heads + line_index) * params.capacity;
  }

  __device__ __forceinline__ static int count(const PassParams& params) {
    return params.batch_size * params.num_kv_heads * params.num_splits;
  }
};

__device__ __forceinline__ int pair_tiles(const PassParams& params) {
  return divide_up(params.num_rows * (params.num_heads / params.num_kv_heads), 16);
}

// By the producer: the far keys and values, again for every tile of pairs.
template <typename T, int kTiles>
__device__ __forceinline__ void stream_prefix(PassContext<T, kTiles>& context, int layer, uint64_t policy) {
  const PassParams& params = context.params;
  const int lane = lane_index(), dim = params.head_dim, bytes = dim * static_cast<int>(sizeof(T));
  const int units = AttentionUnit::count(params), tiles = pair_tiles(params);
  const int under_way = min(params.under_way, context.ring.num_slots() - 1);
  const T* const source = static_cast<const T*>(lane < kKeyGroup ? params.keys : params.values);
  for (int index = static_cast<int>(blockIdx.x); index < units; index += params.num_blocks) {
    const AttentionUnit unit(params, context.shared, layer, index);
    const T* const line = source + (unit.line + lane % kKeyGroup) * dim;
    for (int tile = 0; tile < tiles; ++tile) {
      for (int group = unit.split; group < unit.groups; group += params.num_splits) {
        context.ring.acquire(2 * kKeyGroup * bytes, under_way);
        context.ring.copy(lane * key_pitch(dim), line + group * kKeyGroup * dim, bytes, policy);
        context.ring.advance(1);
      }
    }
  }
}

// By the consumers.
template <typename T, int kTiles, int kDim>
class AttentionStep {
 public:
  __device__ __forceinline__ AttentionStep(PassContext<T, kTiles>& context, int layer)
      : context_(context), params_(context.params), shared_(context.shared), ring_(context.ring), layer_(layer) {
    heads_ = params_.num_heads / params_.num_kv_heads;
    scale_ = params_.scale * 1.44269504f;  // for powers of two
  }

  __device__ __forceinline__ void run() {
    const int units = AttentionUnit::count(params_), tiles = pair_tiles(params_);
    for (int index = static_cast<int>(blockIdx.x); index < units; index += params_.num_blocks) {
      const AttentionUnit unit(params_, shared_, layer_, index);
      for (int tile = 0; tile < tiles; ++tile) {
        first_pair_ = 16 * tile;
        num_pairs_ = min(16, params_.num_rows * heads_ - first_pair_);
        const int place = index / params_.num_splits * tiles + tile;
        results_ = static_cast<int64_t>(place) * (params_.num_splits + kNearParts) * 16;
        attend_near(unit);
        attend_far(unit);
        if (is_last(params_.counters + 2 + place)) merge(unit);
      }
    }
  }

 private:
  static constexpr int kPitch = key_pitch(kDim);
  static constexpr int kPieces = kDim / 8;  // 16-byte pieces of a row of the cache
  static constexpr int kSums = kDim / 8;  // 16 x 8 tiles of the output
  static constexpr int kLaneDims = kDim / 32;  // elements of a row that a lane holds
  using LanePiece = std::conditional_t<kLaneDims == 4, uint2, uint32_t>;

  // Eight near keys and values of a pair, on their way: four lanes for a key, all lanes for a value.
  struct Near {
    uint4 key[kPieces / 4];
    LanePiece value[kNearKeys];
    int count;
  };

  __device__ __forceinline__ int row_of(int pair) const { return (first_pair_ + pair) / heads_; }
  __device__ __forceinline__ int position_of(const AttentionUnit& unit, int row) const {
    return shared_.position[unit.sequence * params_.num_rows + row];
  }

  // The pair's row among all, and its first element of num_heads * head_dim.
  __device__ __forceinline__ int global_row(const AttentionUnit& unit, int pair) const {
    return unit.sequence * params_.num_rows + row_of(pair);
  }
  __device__ __forceinline__ int first_feature(const AttentionUnit& unit, int pair) const {
    return (unit.head * heads_ + (first_pair_ + pair) % heads_) * kDim;
  }

  // Pairs go round the splits, and their parts round the warps.
  struct NearTask {
    int pair, part;
  };
  __device__ __forceinline__ NearTask near_task(const AttentionUnit& unit, int index) const {
    return {unit.split + params_.num_splits * (index / kNearParts), index % kNearParts};
  }

  __device__ __forceinline__ int num_near_tasks(const AttentionUnit& unit) const {
    const int pairs = divide_up(num_pairs_ - unit.split, params_.num_splits);
    return pairs * kNearParts;
  }

  __device__ __forceinline__ void load_near(const AttentionUnit& unit, const NearTask& task, bool wanted,
                                            Near& near) const {
    const Thread thread;
    const int lane = thread.lane, row = wanted ? row_of(task.pair) : 0, prefix = shared_.prefix[unit.sequence];
    const int last = position_of(unit, row), first = far_groups(last) * kKeyGroup + task.part * kNearKeys;
    near.count = wanted ? min(max(last + 1 - first, 0), kNearKeys) : 0;
    const bool inside = lane / 4 < near.count;
    int place = inside ? first + lane / 4 : 0;
    if (place >= prefix && inside) {
      place = prefix + __ldg(params_.visible + row * kMaxVisible + place - prefix);
    }
    const T* const keys = static_cast<const T*>(params_.keys) + unit.line * kDim;
    const T* const values = static_cast<const T*>(params_.values) + unit.line * kDim;
#pragma unroll
    for (int i = 0; i < kPieces / 4; ++i) {
      const uint4* const piece = reinterpret_cast<const uint4*>(keys + place * kDim) + 4 * i + lane % 4;
      near.key[i] = inside ? __ldcg(piece) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kNearKeys; ++i) {
      const int from = __shfl_sync(kAllLanes, place, 4 * i);
      const LanePiece* const piece = reinterpret_cast<const LanePiece*>(values + from * kDim) + lane;
      near.value[i] = i < near.count ? __ldcg(piece) : LanePiece{};
    }
  }

  // Leaves the queries of the tile in shared memory; they travel beside the first keys and values.
  __device__ __forceinline__ void attend_near(const AttentionUnit& unit) {
    const Thread thread;
    const int tasks = num_near_tasks(unit);
    int index = thread.warp;
#pragma unroll 1
    do {
      const NearTask task = near_task(unit, index);
      Near near;
      load_near(unit, task, index < tasks, near);
      if (index == thread.warp) load_queries(unit);
      if (index < tasks) write_near(task, near);
      index += kConsumerWarps;
    } while (index < tasks);
  }

  __device__ __forceinline__ void load_queries(const AttentionUnit& unit) {
    const Thread thread;
    const int pair = thread.index / kPieces, piece = thread.index % kPieces;
    if (pair < 16) {
      uint4 value = {0, 0, 0, 0};
      if (pair < num_pairs_) {
        const int at = global_row(unit, pair) * params_.num_heads * kDim + first_feature(unit, pair);
        const T* const query = static_cast<const T*>(params_.queries) + at;
        value = __ldcg(reinterpret_cast<const uint4*>(query) + piece);
      }
      shared_.queries[(pair * kPitch) / 16 + piece] = value;
    }
    sync_consumers();
  }

  __device__ __forceinline__ void write_near(const NearTask& task, const Near& near) {
    const Thread thread;
    const int lane = thread.lane;
    const uint4* const query = shared_.queries + task.pair * kPitch / 16;
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < kPieces / 4; ++i) {
      const uint4 a = query[4 * i + lane % 4], b = near.key[i];
      const uint32_t from_query[4] = {a.x, a.y, a.z, a.w}, from_key[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 x = unpack<T>(from_query[j]), y = unpack<T>(from_key[j]);
        sums[j] = fmaf(x.y, y.y, fmaf(x.x, y.x, sums[j]));
      }
    }
    float score = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    score += __shfl_xor_sync(kAllLanes, score, 1);
    score += __shfl_xor_sync(kAllLanes, score, 2);
    const bool inside = lane / 4 < near.count;
    const float top = warp_max(inside ? score * scale_ : -kInfinity);
    const float weight = inside ? exp2f(score * scale_ - top) : 0.0f;
    float total = weight;
#pragma unroll
    for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(kAllLanes, total, other);
    float output[kLaneDims] = {};
#pragma unroll
    for (int i = 0; i < kNearKeys; ++i) {
      const float share = __shfl_sync(kAllLanes, weight, 4 * i);
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(&near.value[i]);
#pragma unroll
      for (int j = 0; j < kLaneDims / 2; ++j) {
        const float2 value = unpack<T>(words[j]);
        output[2 * j] = fmaf(share, value.x, output[2 * j]);
        output[2 * j + 1] = fmaf(share, value.y, output[2 * j + 1]);
      }
    }
    const int64_t at = results_ + (params_.num_splits + task.part) * 16 + task.pair;
    float* const out = params_.partials + at * kDim + lane * kLaneDims;
#pragma unroll
    for (int j = 0; j < kLaneDims; j += 2) {
      *reinterpret_cast<float2*>(out + j) = {output[j], output[j + 1]};
    }
    if (lane == 0) reinterpret_cast<float2*>(params_.extremes)[at] = {top, total};
  }

  // The far keys of this split; all warps pass over all slots and take every eighth.
  __device__ __forceinline__ void attend_far(const AttentionUnit& unit) {
    const Thread thread;
    const int lane = thread.lane, g = lane / 4, q = lane % 4;
    if (unit.split >= unit.groups) {
      if (thread.index < 16) write_extreme(unit, thread.index, {-kInfinity, 0});
      return;
    }
    uint32_t queries[kDim / 16][4];
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      load_matrices(queries[k], shared_address(shared_.queries) + lane % 16 * kPitch + (2 * k + lane / 16) * 16);
    }
    int limits[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = g + 8 * half;
      limits[half] = pair < num_pairs_ ? far_groups(position_of(unit, row_of(pair))) : 0;
    }
    float output[kSums][4] = {};
    float top[2] = {-kInfinity, -kInfinity}, total[2] = {};
    int turn = 0;
    uint32_t last_read = 0;
    for (int group = unit.split; group < unit.groups; group += params_.num_splits) {
      const auto place = ring_.place(0);
      ring_.wait_full(place);
      if (turn % kConsumerWarps == thread.warp) {
        const bool sees[2] = {group < limits[0], group < limits[1]};
        last_read = add_group(ring_.address(place), queries, sees, output, top, total);
      }
      ring_.leave(place, last_read);
      ring_.advance(1);
      ++turn;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 1);
      total[half] += __shfl_xor_sync(kAllLanes, total[half], 2);
      if (q == 0) shared_.extremes[thread.warp][g + 8 * half] = {top[half], total[half]};
    }
    sync_consumers();
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) share[half] = share_of(top[half], block_top(g + 8 * half));
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      output[i][0] *= share[0], output[i][1] *= share[0];
      output[i][2] *= share[1], output[i][3] *= share[1];
    }
    if (thread.index < 16) {
      const int pair = thread.index;
      const float highest = block_top(pair);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kConsumerWarps; ++i) {
        const float2 part = shared_.extremes[i][pair];
        sum += part.y * share_of(part.x, highest);
      }
      write_extreme(unit, pair, {highest, sum});
    }
    add_up(unit, output);
  }

  // Online softmax over 16 keys. A row that does not see them is left as it was. Returns what the last loads brought.
  __device__ __forceinline__ uint32_t add_group(uint32_t slot, const uint32_t (&queries)[kDim / 16][4],
                                                const bool (&sees)[2], float (&output)[kSums][4], float (&top)[2],
                                                float (&total)[2]) const {
    const int lane = lane_index(), matrix = lane / 8;
    float scores[2][4] = {};
    const uint32_t key = slot + (lane % 8 + matrix / 2 * 8) * kPitch + matrix % 2 * 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t keys[4];
      load_matrices(keys, key + 32 * k);
      mma<T>(scores[0], queries[k], keys[0], keys[1]);
      mma<T>(scores[1], queries[k], keys[2], keys[3]);
    }
    float weights[2][4], factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = fmaxf(fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                            fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const float next = sees[half] ? fmaxf(top[half], highest * scale_) : top[half];
      factors[half] = sees[half] ? exp2f(top[half] - next) : 1.0f;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
          weights[i][j] = sees[half] ? exp2f(fmaf(scores[i][j], scale_, -next)) : 0.0f;
          sum += weights[i][j];
        }
      }
      total[half] = total[half] * factors[half] + sum;
      top[half] = next;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      output[i][0] *= factors[0], output[i][1] *= factors[0];
      output[i][2] *= factors[1], output[i][3] *= factors[1];
    }
    const uint32_t packed[4] = {pack<T>(weights[0][0], weights[0][1]), pack<T>(weights[0][2], weights[0][3]),
                                pack<T>(weights[1][0], weights[1][1]), pack<T>(weights[1][2], weights[1][3])};
    const uint32_t value = slot + kKeyGroup * kPitch + (lane % 8 + matrix % 2 * 8) * kPitch + matrix / 2 * 16;
    uint32_t last_read = 0;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      uint32_t values[4];
      load_transposed(values, value + 16 * i);
      last_read |= values[0];
      mma<T>(output[i], packed, values[0], values[1]);
      mma<T>(output[i + 1], packed, values[2], values[3]);
    }
    return last_read;
  }

  __device__ __forceinline__ float block_top(int pair) const {
    float highest = -kInfinity;
#pragma unroll
    for (int i = 0; i < kConsumerWarps; ++i) highest = fmaxf(highest, shared_.extremes[i][pair].x);
    return highest;
  }

  // What a part with this maximum counts beside the highest; nothing if it saw no key.
  __device__ __forceinline__ static float share_of(float top, float highest) {
    return top == -kInfinity ? 0.0f : exp2f(top - highest);
  }

  __device__ __forceinline__ void write_extreme(const AttentionUnit& unit, int pair, float2 extreme) const {
    reinterpret_cast<float2*>(params_.extremes)[results_ + unit.split * 16 + pair] = extreme;
  }

  // The outputs of all warps, as this split's part.
  __device__ __forceinline__ void add_up(const AttentionUnit& unit, const float (&output)[kSums][4]) {
    const Thread thread;
    const int part = thread.index / 64, g = thread.index / 8 % 8, column = thread.index % 8;
    float* const out = params_.partials + (results_ + unit.split * 16 + g) * kDim;
    for (int round = 0; round * kSumTiles < kSums; ++round) {
      put_sums(shared_, thread, output, round);
      sync_consumers();
      const float2 sum = take_sums(shared_, part, g, column);
      const int d = (round * kSumTiles + part) * 8 + column;
      if (g < num_pairs_) out[d] = sum.x;
      if (g + 8 < num_pairs_) out[8 * kDim + d] = sum.y;
      sync_consumers();
    }
  }

  // Whether all other splits of this tile are done; the counter wraps to 0 by itself.
  __device__ __forceinline__ bool is_last(uint32_t* counter) {
    sync_consumers();
    if (threadIdx.x == 0) {
      const uint32_t others = static_cast<uint32_t>(params_.num_splits) - 1;
      uint32_t before;
      asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                   : "=r"(before)
                   : "l"(counter), "r"(others)
                   : "memory");
      shared_.last = before == others;
    }
    sync_consumers();
    return shared_.last != 0;
  }

  // The splits in order, then the near parts; 16 threads for a pair.
  __device__ __forceinline__ void merge(const AttentionUnit& unit) const {
    constexpr int kDims = kDim / 16, kMost = kMaxSplits + kNearParts;
    const Thread thread;
    const int pair = thread.index / 16, first = thread.index % 16 * kDims;
    if (pair >= num_pairs_) return;
    float2 parts[kMost];
    float highest = -kInfinity;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const bool there = i < params_.num_splits + kNearParts;
      const float2* const part = reinterpret_cast<const float2*>(params_.extremes) + results_ + i * 16 + pair;
      parts[i] = there ? __ldcg(part) : float2{-kInfinity, 0};
      highest = fmaxf(highest, parts[i].x);
    }
    float total = 0, output[kDims] = {};
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const float share = share_of(parts[i].x, highest);
      const float4* const part =
          reinterpret_cast<const float4*>(params_.partials + (results_ + i * 16 + pair) * kDim + first);
      total += parts[i].y * share;
#pragma unroll
      for (int j = 0; j < kDims; j += 4) {
        const bool counts = parts[i].x != -kInfinity;  // else it may not have been written
        const float4 value = counts ? __ldcg(part + j / 4) : float4{0, 0, 0, 0};
        output[j] = fmaf(value.x, share, output[j]);
        output[j + 1] = fmaf(value.y, share, output[j + 1]);
        output[j + 2] = fmaf(value.z, share, output[j + 2]);
        output[j + 3] = fmaf(value.w, share, output[j + 3]);
      }
    }
    T* const out = static_cast<T*>(params_.mixed) + global_row(unit, pair) * padded_depth(params_.num_heads * kDim);
#pragma unroll
    for (int j = 0; j < kDims; j += 2) {
      const int place = operand_place(first_feature(unit, pair) + first + j);
      *reinterpret_cast<uint32_t*>(out + place) = pack<T>(output[j] / total, output[j + 1] / total);
    }
  }

  PassContext<T, kTiles>& context_;
  const PassParams& params_;
  PassShared& shared_;
  Ring<kSlotBytes>& ring_;
  const int layer_;
  int heads_;
  float scale_;
  int first_pair_, num_pairs_;
  int64_t results_;  // of this tile, in partials and extremes
};

}  // namespace fastspec

#endif  // FASTSPEC_CLUSTERS
