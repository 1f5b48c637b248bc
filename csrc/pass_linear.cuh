// The linear layers of a pass: weights as the wide operand, 16 rows of them by 8 rows of x in one product.
//
// A tile is 16 rows of a weight matrix, chosen so that what belongs together meets in one thread, as rows g and g + 8:
// the halves of a head that RoPE turns, or a gate and its up. Tiles go round the blocks. A block takes a panel of them
// at a time: for each chunk of 256 elements of x every tile of the panel, a slot each. Each warp multiplies its own 32
// elements of every chunk, for all tiles and all rows of x, so a sum has one order: chunks within a warp, then warps.
// Rows of x lie in device memory so that a lane's operands of a chunk are one load of 16 bytes (operand_place).
#pragma once

#include "pass.cuh"

#if FASTSPEC_CLUSTERS

namespace fastspec {

// The step after `index` others.
__device__ __forceinline__ Step step_at(const PassParams& params, int index) {
  return index == kLayerSteps * params.num_layers ? Step::kHead : static_cast<Step>(index % kLayerSteps);
}

template <typename T, int kTiles>
__device__ __forceinline__ Linear linear_at(const PassContext<T, kTiles>& context, int index) {
  const PassParams& params = context.params;
  const int layer = index / kLayerSteps;
  const Step step = step_at(params, index);
  const PassLayer* const weights = context.layers() + layer;
  const int qkv_tiles = (params.num_heads + 2 * params.num_kv_heads) * (params.head_dim / 16);
  const int gate_tiles = params.ffn_size / 8;
  // A block keeps its features in all residual steps; the tiles of the others go on where the last ones ended.
  int dealt = layer * (qkv_tiles + gate_tiles), tiles = 0;
  Linear linear = {step, layer, params.lm_head, params.normed, nullptr, params.hidden_size, 0, 0, context.rows()};
  switch (step) {
    case Step::kQkv:
      linear.weight = weights->qkv, tiles = qkv_tiles;
      break;
    case Step::kGateUp:
      linear.weight = weights->gate_up, tiles = gate_tiles, dealt += qkv_tiles;
      break;
    case Step::kOutput:
      linear.weight = weights->output, linear.input = params.mixed, linear.norm = weights->post_norm;
      linear.depth = params.num_heads * params.head_dim;
      tiles = params.hidden_size / params.residual_tile, dealt = 0;
      break;
    case Step::kDown:
      linear.weight = weights->down, linear.input = params.gated;
      linear.norm = layer + 1 < params.num_layers ? weights[1].input_norm : params.final_norm;
      linear.depth = params.ffn_size;
      tiles = params.hidden_size / params.residual_tile, dealt = 0;
      break;
    default:
      tiles = divide_up(params.vocab_size, kTileRows);
      if (context.call.logit_row != nullptr) linear.rows = params.batch_size;
  }
  const int blocks = params.num_blocks, behind = static_cast<int>(blockIdx.x) - dealt % blocks;
  linear.first = behind < 0 ? behind + blocks : behind;
  linear.count = linear.first < tiles ? divide_up(tiles - linear.first, blocks) : 0;
  return linear;
}

// The first row of the weight matrix in a half of a tile.
__device__ __forceinline__ int weight_row(const PassParams& params, const Linear& linear, int tile, int half) {
  switch (linear.step) {
    case Step::kQkv: {
      const int half_dim = params.head_dim / 2, head = params.head_dim == kMaxHeadDim ? tile / 8 : tile / 4;
      return tile * 8 + head * half_dim + half * half_dim;
    }
    case Step::kGateUp:
      return tile * 8 + half * params.ffn_size;
    default:
      return tile * (linear.norm == nullptr ? kTileRows : params.residual_tile) + half * kBoxRows;
  }
}

// Tiles whose sums a warp keeps in registers together.
template <int kTiles>
constexpr int kPanel = (kTakesRegisters ? 32 : 16) / kTiles;
template <int kTiles>
__device__ __forceinline__ int panel_size(const Ring<kSlotBytes>& ring) {
  return min(kPanel<kTiles>, ring.num_slots());
}

// By the producer: all slots of a step. Two lanes copy a box each.
template <typename T, int kTiles>
__device__ __forceinline__ void stream_weights(PassContext<T, kTiles>& context, const Linear& linear, uint64_t policy) {
  const int lane = lane_index(), panel_tiles = panel_size<kTiles>(context.ring);
  const int boxes = linear.norm != nullptr && context.params.residual_tile == kBoxRows ? 1 : 2;
  const int under_way = min(context.params.under_way, context.ring.num_slots() - 1);
  static_assert(kPanel<kTiles> <= 16);
  for (int panel = 0; panel < linear.count; panel += panel_tiles) {
    const int tiles = min(panel_tiles, linear.count - panel);
    // Lanes t and 16 + t know where tile t of the panel begins.
    const int row =
        weight_row(context.params, linear, linear.first + (panel + lane % 16) * context.params.num_blocks, lane / 16);
    for (int block = 0; block * kBoxBlock < linear.depth; block += kChunk / kBoxBlock) {
      for (int t = 0; t < tiles; ++t) {
        const int box_row = __shfl_sync(kAllLanes, row, lane % 2 * 16 + t);
        context.ring.acquire(boxes * kBoxBytes, under_way);
        if (lane < boxes) context.ring.copy_box(lane * kBoxBytes, linear.weight, box_row, block, policy);
        context.ring.advance(1);
      }
    }
  }
}

// Adds up 16 x 8 sums of all warps, kSumTiles at a time: all threads put, meet, and each takes the sums of rows g and
// g + 8 of one column; they must meet again before the next are put.
template <int kCount>
__device__ __forceinline__ void put_sums(PassShared& shared, const Thread& thread, const float (&sums)[kCount][4],
                                         int round) {
  const int g = thread.lane / 4, q = thread.lane % 4;
#pragma unroll
  for (int first = 0; first < kCount; first += kSumTiles) {
    if (first != round * kSumTiles) continue;
#pragma unroll
    for (int i = 0; i < kSumTiles; ++i) {
      const float (&c)[4] = sums[first + i];
      // The exclusive or keeps the banks apart, here and for every order of reading.
      shared.sums[thread.warp][i][8 * q + (g ^ 2 * q)] = {c[0], c[2], c[1], c[3]};
    }
  }
}
__device__ __forceinline__ float2 take_sums(const PassShared& shared, int tile, int g, int column) {
  const int unit = column / 2 * 8 + (g ^ (column & 6));
  float2 sum = {0, 0};
#pragma unroll
  for (int warp = 0; warp < kConsumerWarps; ++warp) {
    const float2 part = reinterpret_cast<const float2*>(&shared.sums[warp][tile][unit])[column % 2];
    sum.x += part.x, sum.y += part.y;
  }
  return sum;
}

// By the consumers.
template <typename T, int kTiles>
class LinearStep {
 public:
  __device__ __forceinline__ explicit LinearStep(PassContext<T, kTiles>& context)
      : context_(context),
        params_(context.params),
        shared_(context.shared),
        linear_(context.shared.linear),
        ring_(context.ring) {}

  __device__ __forceinline__ void run() {
    const int panel_tiles = panel_size<kTiles>(ring_);
    if (linear_.norm != nullptr) fetch_norm();
    for (int panel = 0; panel < linear_.count; panel += panel_tiles) {
      run_panel(panel, min(panel_tiles, linear_.count - panel));
    }
    if (linear_.norm != nullptr) context_.publish_squares();
  }

 private:
  static constexpr int kSums = kPanel<kTiles> * kTiles;
  // Rows of x come in groups of n-tiles, the loads of the next ones ahead of the products.
  static constexpr int kGroupTiles = kTiles < 4 ? kTiles : 4;
  static constexpr int kGroups = kTiles / kGroupTiles;
  static constexpr int kBuffers = kTiles == 2 ? 4 : 2;
  static constexpr int kItems = kGroups < kBuffers ? kBuffers : kGroups;  // of kItems / kGroups chunks
  static_assert(kItems % kBuffers == 0 && kItems % kGroups == 0);

  using Operand = uint4[kGroupTiles];

  // The row of the step's input that is row n of its output.
  __device__ __forceinline__ int source_row(int n) const {
    if (linear_.step != Step::kHead || context_.call.logit_row == nullptr || n >= linear_.rows) return n;
    const int64_t row = context_.call.logit_row[n];
    return n * params_.num_rows + static_cast<int>(min(max(row, int64_t{0}), int64_t{params_.num_rows - 1}));
  }

  // Brings the few weights that the sums will be multiplied with near, while the products run.
  __device__ __forceinline__ void fetch_norm() const {
    const int index = static_cast<int>(threadIdx.x);
    if (index >= linear_.count) return;
    const int tile = linear_.first + index * params_.num_blocks;
    const T* const norm = static_cast<const T*>(linear_.norm) + tile * params_.residual_tile;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(norm));
  }

  __device__ __forceinline__ void run_panel(int panel, int tiles) {
    const Thread thread;
    const int g = thread.lane / 4, depth = padded_depth(linear_.depth), rows = linear_.rows;
    const int own_k = thread.warp * 32 + thread.lane % 4 * 8;
    const T* const x = static_cast<const T*>(linear_.input) + source_row(g) * depth + own_k;
    const auto load = [&](Operand& operand, int chunk, int group) {
      const bool inside = chunk * kChunk + own_k < depth;
#pragma unroll
      for (int i = 0; i < kGroupTiles; ++i) {
        const int first_row = 8 * (group * kGroupTiles + i);
        operand[i] = inside && first_row + g < rows
                         ? __ldcg(reinterpret_cast<const uint4*>(x + first_row * depth + chunk * kChunk))
                         : uint4{0, 0, 0, 0};
      }
    };
    // Lanes address rows 0-7 of the first box, of the second, then both again eight elements on.
    const int row = thread.lane % 8, piece = thread.warp % 2 * 4 + thread.lane / 16;
    const uint32_t place_in_slot =
        thread.lane / 8 % 2 * kBoxBytes + (thread.warp / 2 * kBoxRows + row) * 128 + (piece ^ row) * 16;

    Operand operands[kBuffers];
    float sums[kSums][4] = {};
#pragma unroll
    for (int item = 0; item < kBuffers - 1; ++item) load(operands[item], item / kGroups, item % kGroups);
    if (linear_.norm == nullptr && panel == 0) read_scales();

    const int chunks = divide_up(linear_.depth, kChunk);
    for (int chunk = 0; chunk < chunks; chunk += kItems / kGroups) {
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int here = chunk + item / kGroups, ahead = item + kBuffers - 1;
        if (here >= chunks) break;
        load(operands[ahead % kBuffers], chunk + ahead / kGroups, ahead % kGroups);
        multiply(sums, operands[item % kBuffers], tiles, item % kGroups, place_in_slot);
        if (item % kGroups == kGroups - 1) ring_.advance(tiles);
      }
    }
    for (int round = 0; round * kSumTiles < tiles * kTiles; ++round) add_up(sums, panel, tiles, round);
  }

  // The tiles of a panel times a group of rows of x, for one chunk.
  __device__ __forceinline__ void multiply(float (&sums)[kSums][4], const Operand& operand, int tiles, int group,
                                           uint32_t place_in_slot) {
#pragma unroll
    for (int t = 0; t < kPanel<kTiles>; ++t) {
      if (t >= tiles) break;
      const auto place = ring_.place(t);
      if (group == 0) ring_.wait_full(place);
      const uint32_t address = ring_.address(place) + place_in_slot;
      uint32_t first[4], second[4];
      load_matrices(first, address);
      load_matrices(second, address ^ 32);  // the next 16 elements
#pragma unroll
      for (int i = 0; i < kGroupTiles; ++i) {
        float (&sum)[4] = sums[t * kTiles + group * kGroupTiles + i];
        mma<T>(sum, first, operand[i].x, operand[i].y);
        mma<T>(sum, second, operand[i].z, operand[i].w);
      }
      if (group == kGroups - 1) ring_.leave(place, first[0] | second[0]);
    }
  }

  // 1 / rms of the rows of x, from the sums of squares of all blocks.
  __device__ __forceinline__ void read_scales() {
    constexpr int kAtOnce = 4;
    const Thread thread;
    const int owners = min(params_.num_blocks, params_.hidden_size / params_.residual_tile);
    for (int first = thread.warp; first < linear_.rows; first += kAtOnce * kConsumerWarps) {
      const float* squares[kAtOnce];
      float sums[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + i * kConsumerWarps;
        squares[i] = params_.squares + source_row(row < linear_.rows ? row : first) * params_.num_blocks;
      }
#pragma unroll 5
      for (int block = thread.lane; block < owners; block += 32) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i * kConsumerWarps < linear_.rows) sums[i] += __ldcg(squares[i] + block);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + i * kConsumerWarps;
        const float sum = warp_sum(sums[i]);
        if (thread.lane == 0 && row < linear_.rows) {
          shared_.scale[row] = rsqrtf(sum / static_cast<float>(params_.hidden_size) + params_.epsilon);
        }
      }
    }
  }

  // Some sums of the panel, finished.
  __device__ __forceinline__ void add_up(const float (&sums)[kSums][4], int panel, int tiles, int round) {
    const Thread thread;
    const int part = thread.index / 64, g = thread.index % 8, column = thread.index / 8 % 8;
    const int at = round * kSumTiles + part, index = panel + at / kTiles, row = at % kTiles * 8 + column;
    const bool inside = at < tiles * kTiles;
    const int tile = linear_.first + index * params_.num_blocks;
    const bool wanted = inside && row < linear_.rows;
    float2 factors = {};
    if (wanted) factors = read_factors(tile, row, g);
    put_sums(shared_, thread, sums, round);
    sync_consumers();
    const float2 sum = take_sums(shared_, part, g, column);
    sync_consumers();
    switch (linear_.step) {
      case Step::kOutput:
      case Step::kDown:
        if (inside) add_residual(index, row, g, sum, factors);
        break;
      case Step::kQkv:
        if (wanted) write_qkv(tile, row, g, sum, factors);
        break;
      case Step::kGateUp:
        if (wanted) write_gated(tile, row, g, sum);
        break;
      default:
        if (wanted) write_logits(tile, row, g, sum);
    }
  }

  // What the two sums will be multiplied with, read before they are waited for: cosine and sine, or the next norm.
  __device__ __forceinline__ float2 read_factors(int tile, int row, int g) const {
    if (linear_.step == Step::kQkv) {
      const int half = params_.head_dim / 2, pair = tile % (params_.head_dim / 16) * 8 + g;
      return __ldg(reinterpret_cast<const float2*>(params_.rotation) + shared_.position[row] * half + pair);
    }
    if (linear_.norm == nullptr) return {};
    const T* const norm = static_cast<const T*>(linear_.norm) + tile * params_.residual_tile + g;
    return {to_float(norm[0]), params_.residual_tile == 16 ? to_float(norm[8]) : 0.0f};
  }

  __device__ __forceinline__ void add_residual(int own, int row, int g, float2 sum, float2 norm) {
    float2 value = {};
    if (row < linear_.rows) {
      const float* const kept = context_.residual_at(own, row, g);
      value = {kept[0] + sum.x, params_.residual_tile == 16 ? kept[8] + sum.y : 0.0f};
    }
    context_.settle(own, row, g, value, norm);
  }

  __device__ __forceinline__ void write_qkv(int tile, int row, int g, float2 sum, float2 rotation) {
    const int dim = params_.head_dim, half = dim / 2, d = tile % (dim / 16) * 8 + g;
    int head = tile / (dim / 16);
    const float scale = shared_.scale[row];
    float2 value = {sum.x * scale, sum.y * scale};
    const T* const bias = static_cast<const T*>(context_.layers()[linear_.layer].qkv_bias);
    if (bias != nullptr) {
      value.x += to_float(bias[head * dim + d]);
      value.y += to_float(bias[head * dim + d + half]);
    }
    if (head < params_.num_heads + params_.num_kv_heads) {
      value = {value.x * rotation.x - value.y * rotation.y, value.y * rotation.x + value.x * rotation.y};
    }
    T* out;
    if (head < params_.num_heads) {
      out = static_cast<T*>(params_.queries) + (row * params_.num_heads + head) * dim + d;
    } else {
      head -= params_.num_heads;
      const bool is_key = head < params_.num_kv_heads;
      if (!is_key) head -= params_.num_kv_heads;
      const int sequence = linear_.layer * params_.batch_size + row / params_.num_rows;
      const int64_t line = static_cast<int64_t>(sequence * params_.num_kv_heads + head) * params_.capacity;
      out = static_cast<T*>(is_key ? params_.keys : params_.values) + (line + shared_.cache_row[row]) * dim + d;
    }
    out[0] = round_to<T>(value.x);
    out[half] = round_to<T>(value.y);
  }

  __device__ __forceinline__ void write_gated(int tile, int row, int g, float2 sum) {
    const float scale = shared_.scale[row];
    const float gate = sum.x * scale, up = sum.y * scale;
    T* const gated = static_cast<T*>(params_.gated) + row * padded_depth(params_.ffn_size);
    gated[operand_place(tile * 8 + g)] = round_to<T>(gate / (1 + __expf(-gate)) * up);
  }

  __device__ __forceinline__ void write_logits(int tile, int row, int g, float2 sum) {
    const int token = tile * kTileRows + g;
    const float scale = shared_.scale[row];
    float* const out = context_.call.logits + static_cast<int64_t>(row) * params_.vocab_size + token;
    if (token < params_.vocab_size) out[0] = sum.x * scale;
    if (token + 8 < params_.vocab_size) out[8] = sum.y * scale;
  }

  PassContext<T, kTiles>& context_;
  const PassParams& params_;
  PassShared& shared_;
  const Linear& linear_;
  Ring<kSlotBytes>& ring_;
};

}  // namespace fastspec

#endif  // FASTSPEC_CLUSTERS
