// A whole pass of a transformer over 1 to 128 rows, from token ids to logits, in one launch: a cooperative grid of one
// block per multiprocessor, for sm_90 and up.
//
// A warp of each block is its producer: it streams everything of the weights and of the cache's prefix that its
// block needs through a ring of slots (ring.cuh), in the order of use, and runs ahead across the phases. So device
// memory does not idle while the other warps, the consumers, wait for each other between phases:
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
// The norms are split: who changes the residual stream writes h * g and the sum of squares of its features, who reads
// it scales its sums by 1 / rms.
//
// A row's logits depend on nothing but its own tokens: every sum has one order, whatever the number of rows, their
// places, the tree, or where the prefix ends.
#pragma once

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
__host__ __device__ constexpr int key_pitch(int head_dim) { return 2 * head_dim + 16; }
// What a swizzled box needs: its pattern is that of the address.
constexpr int kSlotAlignment = 1024;
constexpr int kSlotBytes = 9 * kSlotAlignment;
static_assert(2 * kKeyGroup * key_pitch(kMaxHeadDim) <= kSlotBytes);

// Weights come as boxes of 8 rows, 4 blocks of 64 elements of each: [block][row][64], the eight 16-byte pieces of a
// row swapped by exclusive or with the row, so that eight rows lie in different banks. Two boxes make a slot.
constexpr int kBoxRows = 8;
constexpr int kBoxBlock = 64;
constexpr int kBoxBytes = kBoxRows * kChunk * 2;
static_assert(2 * kBoxBytes <= kSlotBytes && 2 * kBoxRows == kTileRows);

// Activations lie in device memory by blocks of 32 elements, in which a lane's operands of two products are neighbours:
// lanes with lane % 4 = q need elements 2q, 2q + 1, 2q + 8 and 2q + 9 of both halves. Rows are padded with zeros.
__host__ __device__ constexpr int padded_depth(int depth) { return (depth + 31) / 32 * 32; }
__device__ __forceinline__ int operand_place(int element) {
  const int half = element / 16 % 2, octet = element / 8 % 2, q = element / 2 % 4;
  return element / 32 * 32 + q * 8 + half * 4 + octet * 2 + element % 2;
}

// 16 x 8 sums of each warp that are added up at a time.
constexpr int kSumTiles = 4;

// What a block computes one after the other. The numbers are those of a step within a layer.
enum class Step : int { kQkv = 0, kAttention = 1, kOutput = 2, kGateUp = 3, kDown = 4, kHead = 5 };
constexpr int kLayerSteps = 5;

// A linear step, and a block's share of it.
struct Linear {
  Step step;
  int layer;
  const void *weight, *input;  // the weights' tensor map
  const void* norm;  // whose weights the new residual stream is multiplied with
  int depth;         // elements of a row
  int first, count;  // tiles first, first + num_blocks, ...
  int rows;          // of the output
};

struct alignas(kSlotAlignment) PassShared {
  float4 sums[kConsumerWarps][kSumTiles][32];
  uint4 queries[kKeyGroup * key_pitch(kMaxHeadDim) / 16];
  float2 extremes[kConsumerWarps][16];
  float scale[kMaxPassRows];    // 1 / rms of each row of x
  int position[kMaxPassRows];   // of each row,
  int cache_row[kMaxPassRows];  // and where its key and value go
  int prefix[kMaxPassBatch];
  int last;
  Linear linear;  // that the consumers are at
  RingBarriers barriers;
};

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// Tiles of the residual stream that a block owns at most.
__host__ __device__ inline int max_owned(const PassParams& params) {
  return divide_up(params.hidden_size / params.residual_tile, params.num_blocks);
}

// Rows that the kernel for so many computes: the smallest it is compiled for that has room for them.
__host__ __device__ constexpr int padded_rows(int rows) {
  return rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
}

// Shared memory: PassShared, the ring, and what follows it: the residual stream [owned, padded_rows, 16], the sums of
// squares of its tiles [owned, padded_rows], and the layers' pointers.
__host__ __device__ inline int bytes_behind_ring(const PassParams& params, int padded_rows) {
  return max_owned(params) * padded_rows * (kTileRows + 1) * 4 +
         params.num_layers * static_cast<int>(sizeof(PassLayer));
}

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
  PassShared& shared;
  Ring<kSlotBytes> ring;

  __device__ __forceinline__ PassContext(const PassParams& params, const PassCall& call, int num_slots)
      : params(params),
        call(call),
        shared(*reinterpret_cast<PassShared*>(pass_memory)),
        ring(pass_memory + sizeof(PassShared), shared.barriers, num_slots) {}

  __device__ __forceinline__ float* residual() const {
    return reinterpret_cast<float*>(pass_memory + sizeof(PassShared) + ring.num_slots() * kSlotBytes);
  }
  __device__ __forceinline__ float* tile_squares() const {
    return residual() + max_owned(params) * kPaddedRows * kTileRows;
  }
  __device__ __forceinline__ PassLayer* layers() const {
    return reinterpret_cast<PassLayer*>(tile_squares() + max_owned(params) * kPaddedRows);
  }

  __device__ __forceinline__ int rows() const { return params.batch_size * params.num_rows; }

  // Tiles of the residual stream that this block owns: blockIdx.x, blockIdx.x + num_blocks, ...
  __device__ __forceinline__ int owned() const {
    const int tiles = params.hidden_size / params.residual_tile, block = static_cast<int>(blockIdx.x);
    return block < tiles ? divide_up(tiles - block, params.num_blocks) : 0;
  }

  __device__ __forceinline__ float* residual_at(int own, int row, int g) const {
    return residual() + (own * kPaddedRows + row) * kTileRows + g;
  }

  // New values of features g and g + 8 of an owned tile; by eight neighbouring lanes for g = 0 to 7.
  __device__ __forceinline__ void settle(int own, int row, int g, float2 value, float2 norm) const {
    if (row < rows()) {
      float* const kept = residual_at(own, row, g);
      const int tile = static_cast<int>(blockIdx.x) + own * params.num_blocks;
      T* const normed = static_cast<T*>(params.normed) + row * padded_depth(params.hidden_size);
      const int feature = tile * params.residual_tile + g;
      kept[0] = value.x, kept[8] = value.y;
      normed[operand_place(feature)] = round_to<T>(value.x * norm.x);
      if (params.residual_tile == 16) normed[operand_place(feature + 8)] = round_to<T>(value.y * norm.y);
    }
    float square = value.x * value.x + value.y * value.y;
#pragma unroll
    for (int lane = 1; lane < 8; lane *= 2) square += __shfl_xor_sync(kAllLanes, square, lane);
    if (g == 0) tile_squares()[own * kPaddedRows + row] = square;
  }

  // After all tiles have settled.
  __device__ __forceinline__ void publish_squares() const {
    sync_consumers();
    const int row = static_cast<int>(threadIdx.x), tiles = owned();
    if (row >= rows() || tiles == 0) return;
    float sum = 0;
    for (int own = 0; own < tiles; ++own) sum += tile_squares()[own * kPaddedRows + row];
    params.squares[row * params.num_blocks + static_cast<int>(blockIdx.x)] = sum;
  }
};

#endif  // FASTSPEC_CLUSTERS

}  // namespace fastspec
