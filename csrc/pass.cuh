// A whole pass of a transformer over 1 to 128 rows, from token ids to logits, in one launch: a cooperative grid of one
// block per multiprocessor, for sm_90 and up.
//
// A warp of each block is its producer: it streams everything of the weights and of the cache's prefix that its
// block needs through a ring of slots (ring.cuh), in the order of use, and runs ahead across the steps. So device
// memory does not idle while the other warps, the consumers, wait for what other blocks compute (exchange.cuh):
//
//   embed                    the residual stream, which stays in shared memory: each block owns some features of it
//   for each layer
//     qkv, RoPE, KV write    pass_linear.cuh
//     attention              pass_attention.cuh
//     output, residual
//     gate, up, SiLU
//     down, residual
//   head                     logits
//
// The norms are split: who changes the residual stream hands over h * g and the sums of squares of its features, who
// reads it scales its sums by 1 / rms.
//
// A row's logits depend on nothing but its own tokens: every sum has one order, whatever the number of rows, their
// places, the tree, or where the prefix ends.
#pragma once

#include "exchange.cuh"
#include "mma.cuh"
#include "params.h"
#include "reduce.cuh"
#include "ring.cuh"

namespace fastspec {

constexpr int kConsumerWarps = 8;
constexpr int kConsumers = 32 * kConsumerWarps;
constexpr int kPassThreads = kConsumers + 128;  // registers change hands between groups of four warps

// Whether the consumers can take over registers of the producer's group.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kTakesRegisters = true;
#else
constexpr bool kTakesRegisters = false;
#endif

constexpr int kTileRows = 16;                // rows of a weight matrix that one product takes
constexpr int kChunk = 256;                  // elements of them in one slot

constexpr int kKeyGroup = 16;  // keys of the prefix in one slot, and their values
constexpr int kMaxHeadDim = 128;
__host__ __device__ constexpr int query_pitch(int head_dim) { return 2 * head_dim + 16; }
// What a swizzled box needs: its pattern is that of the address.
constexpr int kSlotAlignment = 1024;
constexpr int kSlotBytes = 8 * kSlotAlignment;

// Matrices come as boxes of some rows and blocks of 64 elements: [block][row][64], the eight 16-byte pieces of a row
// swapped by exclusive or with the row, so that eight rows lie in different banks. Two boxes make a slot: 8 rows of
// weights each, 4 blocks of them; or 16 keys and their values.
constexpr int kBoxBlock = 64;
constexpr int kBoxRows = 8;
constexpr int kBoxBytes = kBoxRows * kChunk * 2;
static_assert(2 * kBoxBytes <= kSlotBytes && 2 * kBoxRows == kTileRows);
__host__ __device__ constexpr int key_box_bytes(int head_dim) { return kKeyGroup * head_dim * 2; }
static_assert(2 * key_box_bytes(kMaxHeadDim) <= kSlotBytes && key_box_bytes(64) % kSlotAlignment == 0);

// Activations that a product reads lie by blocks of 32 elements, the rows of a block side by side, [block][row][32], so
// that a warp's operands of eight rows are whole lines; and within a block a lane's operands of two products are
// neighbours: lanes with lane % 4 = q need elements 2q, 2q + 1, 2q + 8 and 2q + 9 of both halves.
constexpr int kOperandBlock = 32;
__device__ __forceinline__ int operand_place(int rows, int row, int element) {
  const int half = element / 16 % 2, octet = element / 8 % 2, q = element / 2 % 4;
  return (element / kOperandBlock * rows + row) * kOperandBlock + q * 8 + half * 4 + octet * 2 + element % 2;
}

// 16 x 8 sums of each warp that are added up at a time.
constexpr int kSumTiles = 4;

// What a block computes one after the other. The numbers are those of a step within a layer.
enum class Step : int { kQkv = 0, kAttention = 1, kOutput = 2, kGateUp = 3, kDown = 4, kHead = 5 };
constexpr int kLayerSteps = 5;

// A block's share of a linear step: what the producer needs to know of it.
struct Share {
  const void* weight;  // the weights' tensor map
  int depth;           // elements of a row
  int first, count;    // tiles first, first + num_blocks, ...
};

// And what the consumers need.
struct Linear {
  Share share;
  Step step;
  int layer;
  int rows;               // of the output
  const void* input;
  const float* squares;   // of the rows of the input, if it is to be scaled by 1 / rms
  const void* norm;       // whose weights the new residual stream is multiplied with
  void* output;           // where the results are handed over, and
  float* output_squares;  // the squares of the new residual stream
};

struct alignas(kSlotAlignment) PassShared {
  float4 sums[kConsumerWarps][kSumTiles][32];
  uint4 queries[kKeyGroup * query_pitch(kMaxHeadDim) / 16];
  float2 extremes[kConsumerWarps][16];
  float scale[kMaxPassRows];    // 1 / rms of each row of x
  int position[kMaxPassRows];   // of each row,
  int cache_row[kMaxPassRows];  // and where its key and value go
  int prefix[kMaxPassBatch];
  uint64_t launches;    // before this one
  int first_buffer;     // of the exchange, which layer 0 uses
  int ended, swept;     // what the consumers and the sweeper tell each other
  Linear linear[2];     // that the consumers are at, and the next one
  RingBarriers barriers;
};

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// Rows that the kernel for so many computes: the smallest it is compiled for that has room for them.
__host__ __device__ constexpr int padded_rows(int rows) {
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// What follows from the sizes, worked out by the host once.
struct PassPlan {
  int rows;                                              // of all sequences
  int qkv_tiles, gate_tiles, residual_tiles, head_tiles;  // of the weights' rows
  int max_owned;    // tiles of the residual stream that a block owns at most
  int group;        // query heads of a head of the cache
  int qkv_heads;    // of queries, keys and values
  int pair_tiles;   // tiles of 16 pairs of a row and a query head, of a head of the cache
  int units;        // shares of attention
  ExchangeLayout exchange;
  int num_slots = 0;  // of the ring

  explicit PassPlan(const PassParams& params)
      : rows(params.batch_size * params.num_rows),
        qkv_tiles((params.num_heads + 2 * params.num_kv_heads) * (params.head_dim / 16)),
        gate_tiles(params.ffn_size / 8),
        residual_tiles(params.hidden_size / params.residual_tile),
        head_tiles(divide_up(params.vocab_size, kTileRows)),
        max_owned(divide_up(residual_tiles, params.num_blocks)),
        group(params.num_heads / params.num_kv_heads),
        qkv_heads(params.num_heads + 2 * params.num_kv_heads),
        pair_tiles(divide_up(params.num_rows * group, 16)),
        units(params.batch_size * params.num_kv_heads * params.num_splits),
        exchange(params) {}

  // Shared memory behind PassShared and the ring: the residual stream [max_owned, padded_rows, 16] and the layers'
  // pointers.
  int bytes_behind_ring(const PassParams& params) const {
    return max_owned * padded_rows(rows) * kTileRows * 4 + params.num_layers * static_cast<int>(sizeof(PassLayer));
  }
};

#if FASTSPEC_CLUSTERS

// A thread of the consumers. Read anew in every function that is long: else what follows from it would be worked out
// once for all steps, and take the registers of the sums.
struct Thread {
  int index, lane, warp;

  __device__ __forceinline__ Thread() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    lane = index % 32, warp = index / 32;
  }
};

// A barrier of the consumers of a block.
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

extern __shared__ __align__(kSlotAlignment) char pass_memory[];

// What all steps share.
template <typename T, int kTiles>
struct PassContext {
  static constexpr int kPaddedRows = 8 * kTiles;

  const PassParams& params;
  const PassCall& call;
  const PassPlan& plan;
  PassShared& shared;
  Ring<kSlotBytes> ring;

  __device__ __forceinline__ PassContext(const PassParams& params, const PassCall& call, const PassPlan& plan)
      : params(params),
        call(call),
        plan(plan),
        shared(*reinterpret_cast<PassShared*>(pass_memory)),
        ring(pass_memory + sizeof(PassShared), shared.barriers, plan.num_slots) {}

  __device__ __forceinline__ float* residual() const {
    return reinterpret_cast<float*>(pass_memory + sizeof(PassShared) + ring.num_slots() * kSlotBytes);
  }
  __device__ __forceinline__ PassLayer* layers() const {
    return reinterpret_cast<PassLayer*>(residual() + plan.max_owned * kPaddedRows * kTileRows);
  }

  // The exchange buffer of a layer, or of the head, which counts as one more.
  __device__ __forceinline__ char* exchange(int layer) const {
    const int buffer = (shared.first_buffer + layer) % kExchanges;
    return static_cast<char*>(params.exchange) + buffer * plan.exchange.bytes;
  }

  // Tiles of the residual stream that this block owns: blockIdx.x, blockIdx.x + num_blocks, ...
  __device__ __forceinline__ int owned() const {
    const int block = static_cast<int>(blockIdx.x);
    return block < plan.residual_tiles ? divide_up(plan.residual_tiles - block, params.num_blocks) : 0;
  }

  __device__ __forceinline__ float* residual_at(int own, int row, int g) const {
    return residual() + (own * kPaddedRows + row) * kTileRows + g;
  }

  // New values of features g and g + 8 of an owned tile, times the norm's weights and with their squares, to who reads
  // them next; by all lanes of a warp, eight neighbours for g = 0 to 7.
  __device__ __forceinline__ void settle(int own, int row, int g, float2 value, float2 norm, void* normed,
                                         float* squares) const {
    const bool inside = row < plan.rows;
    if (inside) {
      float* const kept = residual_at(own, row, g);
      kept[0] = value.x, kept[8] = value.y;
    }
    const int tile = static_cast<int>(blockIdx.x) + own * params.num_blocks;
    const uint32_t word = pack_neighbours({value.x * norm.x, value.y * norm.y});
    float square = value.x * value.x + value.y * value.y;
#pragma unroll
    for (int lane = 1; lane < 8; lane *= 2) square += __shfl_xor_sync(kAllLanes, square, lane);
    if (!inside) return;
    if (g % 2 == 0 || params.residual_tile == 16) {
      const int feature = tile * params.residual_tile + (g % 2 == 0 ? g : g + 7);
      hand_over(static_cast<T*>(normed) + operand_place(plan.rows, row, feature), word);
    }
    if (g == 0) hand_over(squares + row * plan.residual_tiles + tile, __float_as_uint(square));
  }

  // Of lanes with features g and g + 8: those of g and g + 1 to lanes with an even g, of g + 7 and g + 8 to the others.
  __device__ __forceinline__ static uint32_t pack_neighbours(float2 value) {
    const bool odd = Thread().lane % 2 != 0;
    const float other = __shfl_xor_sync(kAllLanes, odd ? value.x : value.y, 1);
    return odd ? pack<T>(other, value.y) : pack<T>(value.x, other);
  }
};

#endif  // FASTSPEC_CLUSTERS

}  // namespace fastspec
