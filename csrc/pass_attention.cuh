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
// A block takes a split of the keys of one head of the cache, for tiles of 16 pairs of a row and a query head. Every
// part of a pair's attention, the splits and the near ones, goes as messages (mail.cuh) to the block that the pair
// belongs to, which merges them in that order.
#pragma once

#include "mail.cuh"
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
};

// By the producer: the far keys and values, again for every tile of pairs.
template <typename T, int kTiles>
__device__ __forceinline__ void stream_prefix(PassContext<T, kTiles>& context, int layer, uint64_t policy) {
  const PassParams& params = context.params;
  const int lane = lane_index(), bytes = key_box_bytes(params.head_dim);
  const int units = context.plan.units, tiles = context.plan.pair_tiles;
  const int under_way = min(params.under_way, context.ring.num_slots() - 1);
  const void* const map = lane == 0 ? params.key_map : params.value_map;
  for (int index = static_cast<int>(blockIdx.x); index < units; index += params.num_blocks) {
    const AttentionUnit unit(params, context.shared, layer, index);
    for (int tile = 0; tile < tiles; ++tile) {
      for (int group = unit.split; group < unit.groups; group += params.num_splits) {
        context.ring.acquire(2 * bytes, under_way);
        const int row = static_cast<int>(unit.line) + group * kKeyGroup;
        if (lane < 2) context.ring.copy_box(lane * bytes, map, row, 0, policy);
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
    number_ = static_cast<uint32_t>(shared_.launches * params_.num_layers + layer + 1);
    scale_ = params_.scale * 1.44269504f;  // for powers of two
  }

  __device__ __forceinline__ void run() {
    const int units = context_.plan.units, tiles = context_.plan.pair_tiles;
    for (int index = static_cast<int>(blockIdx.x); index < units; index += params_.num_blocks) {
      const AttentionUnit unit(params_, shared_, layer_, index);
      for (int tile = 0; tile < tiles; ++tile) {
        first_pair_ = 16 * tile;
        num_pairs_ = min(16, params_.num_rows * context_.plan.group - first_pair_);
        const int64_t place = index / params_.num_splits * tiles + tile;
        parts_ = static_cast<Message*>(params_.parts) + place * num_parts() * 16 * kTwos;
        attend_near(unit);
        attend_far(unit);
        merge(unit);
        sync_consumers();
      }
    }
  }

 private:
  static constexpr int kPitch = query_pitch(kDim);
  static constexpr int kPieces = kDim / 8;  // 16-byte pieces of a row of the cache
  static constexpr int kSums = kDim / 8;  // 16 x 8 tiles of the output
  static constexpr int kLaneDims = kDim / 32;  // elements of a row that a lane holds
  static constexpr int kTwos = kDim / 2;  // neighbouring elements of the output
  using LanePiece = std::conditional_t<kLaneDims == 4, uint2, uint32_t>;

  // Eight near keys and values of a pair, on their way: four lanes for a key, all lanes for a value.
  struct Near {
    uint4 key[kPieces / 4];
    LanePiece value[kNearKeys];
    int count;
    uint32_t own;  // bit i: value i is one of this pass; bit kNearKeys: so is the lane's key
  };

  // Queries, keys and values of this pass, [rows, heads, head_dim], and the result, as operands of the output step.
  __device__ __forceinline__ const T* handed() const {
    return reinterpret_cast<const T*>(context_.exchange(layer_) + context_.plan.exchange.qkv);
  }
  __device__ __forceinline__ T* mixed() const {
    return reinterpret_cast<T*>(context_.exchange(layer_) + context_.plan.exchange.mixed);
  }

  __device__ __forceinline__ int num_parts() const { return params_.num_splits + kNearParts; }

  // Two elements of a part of a pair's output, already divided by the sum of the weights, with the logarithm of that
  // sum: what the merge needs in one message. A layer writes over those of the layer before: a block has queries when
  // all blocks are done with what was merged there.
  __device__ __forceinline__ Message* message(int part, int pair, int two) const {
    return parts_ + (part * 16 + pair) * kTwos + two;
  }
  __device__ __forceinline__ void send_part(int part, int pair, int two, float2 output, float level) const {
    send(message(part, pair, two), content_of(output.x, output.y), content_of(__uint_as_float(number_), level));
  }

  __device__ __forceinline__ int row_of(int pair) const { return (first_pair_ + pair) / context_.plan.group; }
  __device__ __forceinline__ int position_of(const AttentionUnit& unit, int row) const {
    return shared_.position[unit.sequence * params_.num_rows + row];
  }

  // The pair's row among all, and its first element of num_heads * head_dim.
  __device__ __forceinline__ int global_row(const AttentionUnit& unit, int pair) const {
    return unit.sequence * params_.num_rows + row_of(pair);
  }
  __device__ __forceinline__ int first_feature(const AttentionUnit& unit, int pair) const {
    return (unit.head * context_.plan.group + (first_pair_ + pair) % context_.plan.group) * kDim;
  }

  // Parts of the near keys go round the splits, a part of a pair to a warp.
  struct NearTask {
    int pair, part;
  };
  __device__ __forceinline__ NearTask near_task(const AttentionUnit& unit, int index) const {
    int part = unit.split;
    for (; index >= num_pairs_; index -= num_pairs_) part += params_.num_splits;
    return {index, part};
  }

  // Where the keys of a part lie, a key to four lanes.
  struct NearKeys {
    int count;  // of the part
    int row;  // in the cache; of lanes without a key, row 0
    int own;  // among the rows of this pass, which are handed over; negative in the cache
  };
  __device__ __forceinline__ NearKeys find_near(const AttentionUnit& unit, const NearTask& task) const {
    const int lane = Thread().lane, prefix = shared_.prefix[unit.sequence], row = row_of(task.pair);
    const int last = position_of(unit, row), first = far_groups(last) * kKeyGroup + task.part * kNearKeys;
    NearKeys keys = {min(max(last + 1 - first, 0), kNearKeys), 0, -1};
    if (lane / 4 >= keys.count) return keys;
    keys.row = first + lane / 4;
    if (keys.row < prefix) return keys;
    const int slot = __ldg(params_.visible + row * kMaxVisible + keys.row - prefix);
    keys.row = prefix + slot, keys.own = slot - params_.first_slot;
    return keys;
  }

  // Starts the loads. Those of keys and values of this pass itself may come too early; only these are loaded again.
  __device__ __forceinline__ void load_near(const AttentionUnit& unit, const NearTask& task, bool again,
                                            Near& near) const {
    const int lane = Thread().lane, heads = context_.plan.qkv_heads;
    const NearKeys keys = find_near(unit, task);
    const T* const handed = this->handed() + unit.sequence * params_.num_rows * heads * kDim;
    const auto at = [&](int row, int own, const void* cache, int head) {
      return own >= 0 ? handed + (own * heads + head) * kDim : static_cast<const T*>(cache) + (unit.line + row) * kDim;
    };
    near.count = keys.count;
    near.own = keys.own >= 0 ? 1u << kNearKeys : 0;
    const int key_head = params_.num_heads + unit.head, value_head = key_head + params_.num_kv_heads;
    const uint4* const key = reinterpret_cast<const uint4*>(at(keys.row, keys.own, params_.keys, key_head));
#pragma unroll
    for (int i = 0; i < kPieces / 4; ++i) {
      if (!again || keys.own >= 0) near.key[i] = lane / 4 < near.count ? look_at(key + 4 * i + lane % 4) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kNearKeys; ++i) {
      const int row = __shfl_sync(kAllLanes, keys.row, 4 * i), own = __shfl_sync(kAllLanes, keys.own, 4 * i);
      const T* const value = at(row, own, params_.values, value_head);
      if (!again || own >= 0) {
        near.value[i] = i < near.count ? look_at(reinterpret_cast<const LanePiece*>(value) + lane) : LanePiece{};
      }
      if (own >= 0) near.own |= 1u << i;
    }
  }

  // Whether some lane lacks keys or values of this pass.
  __device__ __forceinline__ static bool misses(const Near& near) {
    bool absent = false;
#pragma unroll
    for (int i = 0; i < kPieces / 4; ++i) absent |= (near.own >> kNearKeys & 1) != 0 && is_absent(near.key[i]);
#pragma unroll
    for (int i = 0; i < kNearKeys; ++i) absent |= (near.own >> i & 1) != 0 && is_absent(near.value[i]);
    return __any_sync(kAllLanes, absent);
  }

  // The near parts of this block; the last warps begin, which have the fewest groups of far keys. The first keys and
  // values are on their way before the queries have come.
  __device__ __forceinline__ void attend_near(const AttentionUnit& unit) const {
    int index = kConsumerWarps - 1 - Thread().warp;
    NearTask task = near_task(unit, index);
    Near near;
    load_near(unit, task, false, near);
    load_queries(unit);
#pragma unroll 1
    while (task.part < kNearParts) {
      index += kConsumerWarps;
      const NearTask next_task = near_task(unit, index);
      Near next;
      load_near(unit, next_task, false, next);
      Patience patience("near keys of layer", layer_);
      while (misses(near)) {
        load_near(unit, task, true, near);
        patience.poll();
      }
      send_near(task, near);
      task = next_task, near = next;
    }
  }

  // Brings the queries of the tile to shared memory.
  __device__ __forceinline__ void load_queries(const AttentionUnit& unit) const {
    const Thread thread;
    const int pair = thread.index / kPieces, piece = thread.index % kPieces;
    if (pair < 16) {
      uint4 value = {0, 0, 0, 0};
      if (pair < num_pairs_) {
        const int heads = context_.plan.qkv_heads;
        const int at = global_row(unit, pair) * heads * kDim + first_feature(unit, pair);
        const uint4* const query = reinterpret_cast<const uint4*>(handed() + at) + piece;
        Patience patience("queries of layer", layer_);
        do {
          value = look_at(query);
          patience.poll();
        } while (is_absent(value));
      }
      shared_.queries[(pair * kPitch) / 16 + piece] = value;
    }
    sync_consumers();
  }

  __device__ __forceinline__ void send_near(const NearTask& task, const Near& near) const {
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
    const float level = level_of(top, total), factor = total > 0 ? 1.0f / total : 0.0f;
#pragma unroll
    for (int j = 0; j < kLaneDims; j += 2) {
      send_part(params_.num_splits + task.part, task.pair, (lane * kLaneDims + j) / 2,
                {output[j] * factor, output[j + 1] * factor}, level);
    }
  }

  // The far keys of this split; all warps pass over all slots and take every eighth.
  __device__ __forceinline__ void attend_far(const AttentionUnit& unit) {
    const Thread thread;
    const int lane = thread.lane, g = lane / 4, q = lane % 4;
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
        last_read = add_group(ring_.address(place), sees, output, top, total);
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
    send_far(unit, output);
  }

  // Online softmax over 16 keys. A row that does not see them is left as it was. Returns what the last loads brought.
  __device__ __forceinline__ uint32_t add_group(uint32_t slot, const bool (&sees)[2], float (&output)[kSums][4],
                                                float (&top)[2], float (&total)[2]) const {
    const int lane = Thread().lane, matrix = lane / 8;
    float scores[2][4] = {};
    const uint32_t key = slot + (lane % 8 + matrix / 2 * 8) * 128;
    const uint32_t query = shared_address(shared_.queries) + lane % 16 * kPitch + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t queries[4], keys[4];
      load_matrices(queries, query + 32 * k);
      load_matrices(keys, key + k / 4 * (kKeyGroup * 128) + ((2 * k % 8 + matrix % 2) ^ lane % 8) * 16);
      mma<T>(scores[0], queries, keys[0], keys[1]);
      mma<T>(scores[1], queries, keys[2], keys[3]);
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
    const uint32_t value = slot + key_box_bytes(kDim) + (lane % 8 + matrix % 2 * 8) * 128;
    uint32_t last_read = 0;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      uint32_t values[4];
      load_transposed(values, value + i / 8 * (kKeyGroup * 128) + ((i % 8 + matrix / 2) ^ lane % 8) * 16);
      last_read |= values[0];
      mma<T>(output[i], packed, values[0], values[1]);
      mma<T>(output[i + 1], packed, values[2], values[3]);
    }
    return last_read;
  }

  // The logarithm of the sum of weights 2^score, from those relative to their maximum; -inf of none.
  __device__ __forceinline__ static float level_of(float top, float total) { return top + log2f(total); }

  // What a part with this maximum counts beside the highest; nothing if it saw no key.
  __device__ __forceinline__ static float share_of(float top, float highest) {
    return top == -kInfinity ? 0.0f : exp2f(top - highest);
  }

  // The outputs of all warps, four pairs at a time, as this split's part: a thread for two elements of a pair.
  __device__ __forceinline__ void send_far(const AttentionUnit& unit, const float (&output)[kSums][4]) {
    constexpr int kAtOnce = 4;
    static_assert(kConsumerWarps * kAtOnce * kTwos * sizeof(float2) <= sizeof(shared_.sums));
    const Thread thread;
    const int g = thread.lane / 4, q = thread.lane % 4;
    float2* const sums = reinterpret_cast<float2*>(shared_.sums);
    // The exclusive or keeps the banks of four pairs apart.
    const auto place = [](int warp, int pair, int two) { return (warp * kAtOnce + pair) * kTwos + (two ^ 4 * pair); };
#pragma unroll
    for (int round = 0; round < 16 / kAtOnce; ++round) {
      if (round * kAtOnce >= num_pairs_) break;
      if (g / kAtOnce == round % 2) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          sums[place(thread.warp, g % kAtOnce, 4 * i + q)] = {output[i][round / 2 * 2], output[i][round / 2 * 2 + 1]};
        }
      }
      sync_consumers();
      const int at = thread.index / kTwos, two = thread.index % kTwos, pair = round * kAtOnce + at;
      if (at < kAtOnce && pair < num_pairs_) {
        float highest = -kInfinity, total = 0;
        float2 sum = {0, 0};
#pragma unroll
        for (int i = 0; i < kConsumerWarps; ++i) highest = fmaxf(highest, shared_.extremes[i][pair].x);
#pragma unroll
        for (int i = 0; i < kConsumerWarps; ++i) {
          const float2 extreme = shared_.extremes[i][pair], part = sums[place(i, at, two)];
          const float share = share_of(extreme.x, highest);
          total = fmaf(extreme.y, share, total);
          sum.x = fmaf(part.x, share, sum.x), sum.y = fmaf(part.y, share, sum.y);
        }
        const float factor = total > 0 ? 1.0f / total : 0.0f;
        send_part(unit.split, pair, two, {sum.x * factor, sum.y * factor}, level_of(highest, total));
      }
      sync_consumers();
    }
  }

  // The splits in order, then the near parts; a thread for two elements of a pair of this block. All messages at once
  // where registers allow it, else some at a time, twice.
  __device__ __forceinline__ void merge(const AttentionUnit& unit) const {
    constexpr int kMost = kMaxSplits + kNearParts, kAtOnce = kTakesRegisters && kTiles < 8 ? kMost : kMost / 4;
    const Thread thread;
    const int pairs = divide_up(num_pairs_ - unit.split, params_.num_splits);
#pragma unroll 1
    for (int task = thread.index; task < pairs * kTwos; task += kConsumers) {
      const int pair = unit.split + params_.num_splits * (task / kTwos), two = task % kTwos;
      Message messages[kAtOnce];
      const auto bring = [&](int first) {
        const Message* const from = message(first, pair, two);
        const int count = num_parts() - first;
        Patience patience("parts of layer", layer_);
        bool missing;
        do {
          missing = false;
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (i < count) messages[i] = look(from + i * 16 * kTwos);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            missing |= i < count && static_cast<uint32_t>(messages[i].number) != number_;
          }
          patience.poll();
        } while (missing);
      };
      float highest = -kInfinity, total = 0;
      float2 output = {0, 0};
#pragma unroll 1
      for (int first = 0; first < num_parts(); first += kAtOnce) {
        bring(first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < num_parts()) highest = fmaxf(highest, second_of(messages[i].number));
        }
      }
#pragma unroll 1
      for (int first = 0; first < num_parts(); first += kAtOnce) {
        if (kAtOnce < kMost) bring(first);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i >= num_parts()) break;
          const float share = share_of(second_of(messages[i].number), highest);
          total += share;
          output.x = fmaf(first_of(messages[i].content), share, output.x);
          output.y = fmaf(second_of(messages[i].content), share, output.y);
        }
      }
      const int feature = first_feature(unit, pair) + 2 * two;
      hand_over(mixed() + operand_place(context_.plan.rows, global_row(unit, pair), feature),
                pack<T>(output.x / total, output.y / total));
    }
  }

  PassContext<T, kTiles>& context_;
  const PassParams& params_;
  PassShared& shared_;
  Ring<kSlotBytes>& ring_;
  const int layer_;
  float scale_;
  int first_pair_, num_pairs_;
  Message* parts_;  // of this tile
  uint32_t number_;  // of this layer among those of all launches
};

}  // namespace fastspec

#endif  // FASTSPEC_CLUSTERS
