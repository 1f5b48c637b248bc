// The linear layers of a pass: weights as the wide operand, 16 rows of them by 8 rows of x in one product.
//
// A tile is 16 rows of a weight matrix, chosen so that what belongs together meets in one thread, as rows g and g + 8:
// the halves of a head that RoPE turns, or a gate and its up. Tiles go round the blocks. A block takes a panel of them
// at a time: for each chunk of 256 elements of x every tile of the panel, a slot each. Each warp multiplies its own 32
// elements of every chunk, for all tiles and all rows of x, so a sum has one order: chunks within a warp, then warps.
// x lies in device memory so that a lane's operands of a chunk are one load of 16 bytes (operand_place), which is
// repeated until they have come.
#pragma once

#include "pass.cuh"

#if FASTSPEC_CLUSTERS

namespace fastspec {

// The step after `index` others.
__device__ __forceinline__ Step step_at(const PassParams& params, int index) {
  return index == kLayerSteps * params.num_layers ? Step::kHead : static_cast<Step>(index % kLayerSteps);
}

template <typename T, int kTiles>
__device__ __forceinline__ Share share_at(const PassContext<T, kTiles>& context, int index) {
  const PassParams& params = context.params;
  const int layer = index / kLayerSteps;
  const PassLayer* const weights = context.layers() + layer;
  const PassPlan& plan = context.plan;
  // A block keeps its features in all residual steps; the tiles of the others go on where the last ones ended.
  int dealt = layer * (plan.qkv_tiles + plan.gate_tiles), tiles = 0;
  Share share = {params.lm_head, params.hidden_size, 0, 0};
  switch (step_at(params, index)) {
    case Step::kQkv:
      share.weight = weights->qkv, tiles = plan.qkv_tiles;
      break;
    case Step::kGateUp:
      share.weight = weights->gate_up, tiles = plan.gate_tiles, dealt += plan.qkv_tiles;
      break;
    case Step::kOutput:
      share.weight = weights->output, share.depth = params.num_heads * params.head_dim;
      tiles = plan.residual_tiles, dealt = 0;
      break;
    case Step::kDown:
      share.weight = weights->down, share.depth = params.ffn_size;
      tiles = plan.residual_tiles, dealt = 0;
      break;
    default:
      tiles = plan.head_tiles;
  }
  const int blocks = params.num_blocks, behind = static_cast<int>(blockIdx.x) - dealt % blocks;
  share.first = behind < 0 ? behind + blocks : behind;
  share.count = share.first < tiles ? divide_up(tiles - share.first, blocks) : 0;
  return share;
}

// The same for the consumers, with what they read and write.
template <typename T, int kTiles>
__device__ __forceinline__ Linear linear_at(const PassContext<T, kTiles>& context, int index) {
  const PassParams& params = context.params;
  const int layer = index / kLayerSteps;
  const PassLayer* const weights = context.layers() + layer;
  const ExchangeLayout& layout = context.plan.exchange;
  char* const here = context.exchange(layer);
  Linear linear = {};
  linear.share = share_at(context, index), linear.step = step_at(params, index);
  linear.layer = layer, linear.rows = context.plan.rows;
  const auto read_normed = [&](int which) {
    linear.input = here + layout.normed[which];
    linear.squares = reinterpret_cast<const float*>(here + layout.squares[which]);
  };
  const auto write_normed = [&](char* buffer, int which) {
    linear.output = buffer + layout.normed[which];
    linear.output_squares = reinterpret_cast<float*>(buffer + layout.squares[which]);
  };
  switch (linear.step) {
    case Step::kQkv:
      linear.output = here + layout.qkv;
      read_normed(0);
      break;
    case Step::kGateUp:
      linear.output = here + layout.gated;
      read_normed(1);
      break;
    case Step::kOutput:
      linear.input = here + layout.mixed, linear.norm = weights->post_norm;
      write_normed(here, 1);
      break;
    case Step::kDown:
      linear.input = here + layout.gated;
      linear.norm = layer + 1 < params.num_layers ? weights[1].input_norm : params.final_norm;
      write_normed(context.exchange(layer + 1), 0);
      break;
    default:
      read_normed(0);
      if (context.call.logit_row != nullptr) linear.rows = params.batch_size;
  }
  return linear;
}

__device__ __forceinline__ bool writes_residual(Step step) { return step == Step::kOutput || step == Step::kDown; }

// The first row of the weight matrix in a half of a tile.
__device__ __forceinline__ int weight_row(const PassParams& params, Step step, int tile, int half) {
  switch (step) {
    case Step::kQkv: {
      const int half_dim = params.head_dim / 2, head = params.head_dim == kMaxHeadDim ? tile / 8 : tile / 4;
      return tile * 8 + head * half_dim + half * half_dim;
    }
    case Step::kGateUp:
      return tile * 8 + half * params.ffn_size;
    default:
      return tile * (writes_residual(step) ? params.residual_tile : kTileRows) + half * kBoxRows;
  }
}

// Tiles whose sums a warp keeps in registers together. Few, though x is read anew for each panel: the results of one
// are handed over while the next is computed, and those of the last are what all blocks wait for.
template <int kTiles>
constexpr int kPanel = kTiles <= 4 ? 4 : (kTakesRegisters ? 32 : 16) / kTiles;
template <int kTiles>
__device__ __forceinline__ int panel_size(const Ring<kSlotBytes>& ring) {
  return min(kPanel<kTiles>, ring.num_slots());
}

// By the producer: all slots of a step. Two lanes copy a box each.
template <typename T, int kTiles>
__device__ __forceinline__ void stream_weights(PassContext<T, kTiles>& context, int index, uint64_t policy) {
  const Step step = step_at(context.params, index);
  const Share share = share_at(context, index);
  const int lane = lane_index(), panel_tiles = panel_size<kTiles>(context.ring);
  const int boxes = writes_residual(step) && context.params.residual_tile == kBoxRows ? 1 : 2;
  const int under_way = min(context.params.under_way, context.ring.num_slots() - 1);
  static_assert(kPanel<kTiles> <= 16);
  for (int panel = 0; panel < share.count; panel += panel_tiles) {
    const int tiles = min(panel_tiles, share.count - panel);
    // Lanes t and 16 + t know where tile t of the panel begins.
    const int row =
        weight_row(context.params, step, share.first + (panel + lane % 16) * context.params.num_blocks, lane / 16);
    for (int block = 0; block * kBoxBlock < share.depth; block += kChunk / kBoxBlock) {
      for (int t = 0; t < tiles; ++t) {
        const int box_row = __shfl_sync(kAllLanes, row, lane % 2 * 16 + t);
        context.ring.acquire(boxes * kBoxBytes, under_way);
        if (lane < boxes) context.ring.copy_box(lane * kBoxBytes, share.weight, box_row, block, policy);
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
  __device__ __forceinline__ LinearStep(PassContext<T, kTiles>& context, const Linear& linear)
      : context_(context), params_(context.params), shared_(context.shared), linear_(linear), ring_(context.ring) {}

  __device__ __forceinline__ void run() {
    const int panel_tiles = panel_size<kTiles>(ring_);
    if (linear_.norm != nullptr) fetch_norm();
    for (int panel = 0; panel < linear_.share.count; panel += panel_tiles) {
      run_panel(panel, min(panel_tiles, linear_.share.count - panel));
    }
  }

 private:
  static constexpr int kSums = kPanel<kTiles> * kTiles;
  // Rows of x come in groups of n-tiles, the loads of the next ones ahead of the products.
  static constexpr int kGroupTiles = kTiles < 4 ? kTiles : 4;
  static constexpr int kGroups = kTiles / kGroupTiles;
  static constexpr int kBuffers = kTiles == 1 ? 8 : kTiles == 2 ? 4 : 2;
  static constexpr int kItems = kGroups < kBuffers ? kBuffers : kGroups;  // of kItems / kGroups chunks
  static_assert(kItems % kBuffers == 0 && kItems % kGroups == 0);

  static constexpr int kFewRows = 2;

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
    if (index >= linear_.share.count) return;
    const int tile = linear_.share.first + index * params_.num_blocks;
    const T* const norm = static_cast<const T*>(linear_.norm) + tile * params_.residual_tile;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(norm));
  }

  __device__ __forceinline__ void run_panel(int panel, int tiles) {
    const Thread thread;
    const int g = thread.lane / 4, depth = linear_.share.depth, rows = linear_.rows;
    const int block_size = context_.plan.rows * kOperandBlock;
    const T* const x = static_cast<const T*>(linear_.input) + thread.warp * block_size + source_row(g) * kOperandBlock +
                       thread.lane % 4 * 8;
    const auto load = [&](Operand& operand, int chunk, int group) {
      const bool inside = chunk * kChunk + thread.warp * kOperandBlock < depth;
      const T* const from = x + chunk * (kChunk / kOperandBlock) * block_size;
#pragma unroll
      for (int i = 0; i < kGroupTiles; ++i) {
        const int first_row = 8 * (group * kGroupTiles + i);
        operand[i] = inside && first_row + g < rows
                         ? look_at(reinterpret_cast<const uint4*>(from + first_row * kOperandBlock))
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

    const bool scales = linear_.squares != nullptr && panel == 0;
    Squares squares = Squares::none();
    if (kTiles <= 2 && scales) squares = look_at_squares(thread.warp, thread.lane);

    const int chunks = divide_up(linear_.share.depth, kChunk);
    for (int chunk = 0; chunk < chunks; chunk += kItems / kGroups) {
#pragma unroll
      for (int item = 0; item < kItems; ++item) {
        const int here = chunk + item / kGroups;
        if (here >= chunks) break;
        const auto load_ahead = [&](int n) {  // the n-th item from here on
          load(operands[(item + n) % kBuffers], chunk + (item + n) / kGroups, (item + n) % kGroups);
        };
        load_ahead(kBuffers - 1);
        if (misses(operands[item % kBuffers])) {
          // Those ahead may miss it too. They are asked for again along with it where that is little, else once.
          const bool all = kTiles == 1 && rows <= kFewRows;
          Patience patience("its input in step", static_cast<int>(linear_.step));
          do {
#pragma unroll
            for (int n = 0; n < kBuffers; ++n) {
              if (n == 0 || all) load_ahead(n);
            }
            patience.poll();
          } while (misses(operands[item % kBuffers]));
          if (!all) {
#pragma unroll
            for (int n = 1; n < kBuffers; ++n) load_ahead(n);
          }
        }
        multiply(sums, operands[item % kBuffers], tiles, item % kGroups, place_in_slot);
        if (item % kGroups == kGroups - 1) ring_.advance(tiles);
      }
    }
    if (scales) read_scales(squares);
    for (int round = 0; round * kSumTiles < tiles * kTiles; ++round) add_up(sums, panel, tiles, round);
  }

  // Whether some lane's share of x has not come.
  __device__ __forceinline__ static bool misses(const Operand& operand) {
    bool absent = false;
#pragma unroll
    for (int i = 0; i < kGroupTiles; ++i) absent |= is_absent(operand[i]);
    return __any_sync(kAllLanes, absent);
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

  // Squares of a row of x, a lane's of 256 tiles of the residual stream from its first on.
  struct Squares {
    uint32_t parts[8];

    __device__ __forceinline__ static Squares none() {
      return {{kAbsent, kAbsent, kAbsent, kAbsent, kAbsent, kAbsent, kAbsent, kAbsent}};
    }
    __device__ __forceinline__ bool misses() const {
      bool absent = false;
#pragma unroll
      for (const uint32_t part : parts) absent |= is_absent(part);
      return absent;
    }
  };
  __device__ __forceinline__ Squares look_at_squares(int row, int first) const {
    const int tiles = context_.plan.residual_tiles;
    const uint32_t* const squares = reinterpret_cast<const uint32_t*>(linear_.squares) + source_row(row) * tiles;
    Squares found;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int tile = first + 32 * i;
      found.parts[i] = row < linear_.rows && tile < tiles ? look_at(squares + tile) : 0;
    }
    return found;
  }

  // 1 / rms of the rows of x, a warp for a row; `early` is what was there of the warp's first, if it was asked for.
  __device__ __forceinline__ void read_scales(Squares early) const {
    const Thread thread;
    for (int row = thread.warp; row < linear_.rows; row += kConsumerWarps) {
      float sum = 0;
      for (int first = thread.lane; first < context_.plan.residual_tiles; first += 256) {
        Squares squares = early;
        if (row != thread.warp || first != thread.lane) squares = look_at_squares(row, first);
        Patience patience("the squares of row", row);
        while (squares.misses()) {
          squares = look_at_squares(row, first);
          patience.poll();
        }
#pragma unroll
        for (const uint32_t part : squares.parts) sum += __uint_as_float(part);
      }
      sum = warp_sum(sum);
      if (thread.lane == 0) {
        shared_.scale[row] = rsqrtf(sum / static_cast<float>(params_.hidden_size) + params_.epsilon);
      }
    }
  }

  // Some sums of the panel, finished.
  __device__ __forceinline__ void add_up(const float (&sums)[kSums][4], int panel, int tiles, int round) {
    const Thread thread;
    const int part = thread.index / 64, g = thread.index % 8, column = thread.index / 8 % 8;
    const int at = round * kSumTiles + part, index = panel + at / kTiles, row = at % kTiles * 8 + column;
    const bool inside = at < tiles * kTiles;
    const int tile = linear_.share.first + index * params_.num_blocks;
    const bool wanted = inside && row < linear_.rows;
    float2 factors = {};
    if (wanted) factors = read_factors(tile, row, g);
    put_sums(shared_, thread, sums, round);
    sync_consumers();
    const float2 sum = take_sums(shared_, part, g, column);
    sync_consumers();
    if (!inside) return;  // whole warps
    switch (linear_.step) {
      case Step::kOutput:
      case Step::kDown:
        add_residual(index, row, g, sum, factors);
        break;
      case Step::kQkv:
        write_qkv(tile, row, g, sum, factors);
        break;
      case Step::kGateUp:
        write_gated(tile, row, g, sum);
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
    context_.settle(own, row, g, value, norm, linear_.output, linear_.output_squares);
  }

  __device__ __forceinline__ void write_qkv(int tile, int row, int g, float2 sum, float2 rotation) {
    const int dim = params_.head_dim, half = dim / 2, d = tile % (dim / 16) * 8 + g, head = tile / (dim / 16);
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
    const uint32_t word = context_.pack_neighbours(value);
    if (row >= linear_.rows) return;
    const int place = g % 2 == 0 ? d : d - 1 + half, heads = context_.plan.qkv_heads;
    hand_over(static_cast<T*>(linear_.output) + (row * heads + head) * dim + place, word);
    if (head < params_.num_heads) return;
    const bool is_key = head < params_.num_heads + params_.num_kv_heads;
    const int kv_head = head - params_.num_heads - (is_key ? 0 : params_.num_kv_heads);
    const int sequence = linear_.layer * params_.batch_size + row / params_.num_rows;
    const int64_t line = static_cast<int64_t>(sequence * params_.num_kv_heads + kv_head) * params_.capacity;
    T* const kept = static_cast<T*>(is_key ? params_.keys : params_.values) + (line + shared_.cache_row[row]) * dim;
    *reinterpret_cast<uint32_t*>(kept + place) = word;
  }

  __device__ __forceinline__ void write_gated(int tile, int row, int g, float2 sum) {
    const float scale = shared_.scale[row];
    const float gate = sum.x * scale, up = sum.y * scale;
    const float value = gate / (1 + __expf(-gate)) * up;
    const float next = __shfl_down_sync(kAllLanes, value, 1);
    if (row >= linear_.rows || g % 2 != 0) return;
    hand_over(static_cast<T*>(linear_.output) + operand_place(linear_.rows, row, tile * 8 + g), pack<T>(value, next));
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
