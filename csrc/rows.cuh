// Rows of logits: reading with penalties, statistics, and the threshold that top-k, top-p and min-p become.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "params.h"
#include "reduce.cuh"

namespace fastspec {

constexpr float kInfinity = INFINITY;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kCandidates = 2 * kThreads;  // most tokens that the fast threshold search can look at

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The sampling parameters of one sequence.
struct Law {
  float scale;  // log2(e) / temperature; the weight of a logit x is 2 ** ((x - max) * scale)
  bool greedy;
  int top_k;    // 0: all
  float min_p;  // 0: all
  double top_p;  // 1: all
  __device__ __forceinline__ bool cuts() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

__device__ __forceinline__ Law load_law(const SamplingParams& sampling, int sequence, int vocab_size) {
  const float temperature = static_cast<float>(sampling.temperature[sequence]);
  const int64_t top_k = sampling.top_k[sequence];
  return {temperature > 0 ? fminf(kLog2e / temperature, 1e30f) : kLog2e, !(temperature > 0),
          top_k < vocab_size ? static_cast<int>(top_k) : 0, static_cast<float>(sampling.min_p[sequence]),
          sampling.top_p[sequence]};
}

// The law of log-weights as they are.
__device__ __forceinline__ Law plain_law() { return {kLog2e, false, 0, 0.0f, 1.0}; }

// What a tree node's prefix does to its row: repetition penalty, and ends that must not come yet.
struct Penalties {
  float repetition;      // 1: none
  bool too_short;        // no end of sequence at this node
  int node;
  const int* tokens;     // [N] of the tree
  const int* parents;    // [N]
  const uint8_t* seen;   // [V]
  const int64_t* eos;    // [kMaxEos], padded with -1

  __device__ __forceinline__ bool any() const { return repetition != 1.0f || too_short; }

  __device__ __forceinline__ float operator()(float x, int token) const {
    if (repetition != 1.0f) {
      bool found = seen[token];
#pragma unroll 1
      for (int place = node; place > 0; place = parents[place]) found |= tokens[place] == token;
      if (found) x = x < 0 ? x * repetition : x / repetition;
    }
    if (too_short) {
#pragma unroll 1
      for (int i = 0; i < kMaxEos; ++i) {
        if (eos[i] == token) x = -kInfinity;
      }
    }
    return x;
  }
};

// One row of logits in any of the element types; a branch on the type is uniform over the launch.
struct Row {
  const void* logits;
  LogitType type;
  int vocab_size;
  Penalties penalties;

  __device__ __forceinline__ float raw(int token) const {
    if (type == LogitType::kFloat) return static_cast<const float*>(logits)[token];
    if (type == LogitType::kBfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(logits)[token]);
    return __half2float(static_cast<const __half*>(logits)[token]);
  }

  __device__ __forceinline__ float operator[](int token) const {
    const float x = raw(token);
    return penalties.any() ? penalties(x, token) : x;
  }

  // Whether vectors of four logits are aligned.
  __device__ __forceinline__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(logits) % (type == LogitType::kFloat ? 16 : 8) == 0;
  }

  // Four logits from `first` on, -inf beyond the vocabulary.
  __device__ __forceinline__ float4 load(int first, bool vector) const {
    float x[4];
    if (vector && first + 4 <= vocab_size) {
      if (type == LogitType::kFloat) {
        const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(logits) + first);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
      } else {
        const uint2 bits = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(logits) + first);
        if (type == LogitType::kBfloat16) {
          x[0] = __uint_as_float(bits.x << 16), x[1] = __uint_as_float(bits.x & 0xffff0000u);
          x[2] = __uint_as_float(bits.y << 16), x[3] = __uint_as_float(bits.y & 0xffff0000u);
        } else {
          const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&bits.x));
          const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&bits.y));
          x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = first + i < vocab_size ? raw(first + i) : -kInfinity;
    }
    if (penalties.any()) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < vocab_size) x[i] = penalties(x[i], first + i);
      }
    }
    return {x[0], x[1], x[2], x[3]};
  }

  // Calls visit(x, first) with four logits x[0..3] from token `first` on, for this thread's share of the row.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    constexpr int kUnroll = 4;
    constexpr int kStep = kThreads * 4;
    const bool vector = aligned();
#pragma unroll 1
    for (int first = threadIdx.x * 4; first < vocab_size; first += kUnroll * kStep) {
      float4 x[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) x[j] = load(first + j * kStep, vector);
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) visit(x[j], first + j * kStep);
    }
  }
};

// Memory that the row functions share, one per block.
struct RowScratch {
  float floats[kWarps];
  double doubles[kWarps];
  uint64_t masses[kWarps];
  Best bests[kWarps];
  int count;
  float sorted[kCandidates];
  uint64_t prefix[kCandidates];
};

// A token is kept if x >= threshold and its weight >= min_weight; its probability is weight / total.
__device__ __forceinline__ float weight_of(const RowStats& row, float scale, float x) {
  const float weight = exp2_fast((x - row.maximum) * scale);
  return x >= row.threshold && weight >= row.min_weight ? weight : 0.0f;
}

__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Masses are summed as integers: no order of summation can change them.
__device__ __forceinline__ uint64_t fixed_point(float weight) {
  return static_cast<uint64_t>(static_cast<double>(weight) * 0x1p40);
}

// The mass of the logits whose ordered key is at least `key`, or their number.
template <bool kCount>
__device__ __forceinline__ uint64_t mass_from(uint32_t key, const Row& row, const Law& law, float maximum,
                                              RowScratch& scratch) {
  uint64_t mass = 0;
  const auto add = [&](float x) {
    if (ordered_key(x) >= key) mass += kCount ? 1 : fixed_point(exp2_fast((x - maximum) * law.scale));
  };
  row.for_each([&](float4 x, int) { add(x.x), add(x.y), add(x.z), add(x.w); });
  return block_reduce(mass, SumOp(), scratch.masses);
}

// Exact search by bisection over all float values, a pass over the row each: for rows so flat, or so full of
// ties, that the tokens to keep do not fit the candidate list. Returns the threshold.
static __device__ __noinline__ float search_by_bisection(Row row, Law law, float maximum, RowScratch& scratch) {
  const uint32_t top = ordered_key(maximum);
  uint32_t kept = ordered_key(-FLT_MAX);
  if (law.top_k > 0) {  // the largest value that at least k logits reach
    uint32_t low = kept, high = top + 1;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      if (mass_from<true>(middle, row, law, maximum, scratch) >= static_cast<uint64_t>(law.top_k)) {
        low = middle;
      } else {
        high = middle;
      }
    }
    kept = low;
  }
  if (law.top_p < 1) {  // the smallest value whose strictly larger ones weigh less than top_p
    const double enough = law.top_p * static_cast<double>(mass_from<false>(kept, row, law, maximum, scratch));
    uint32_t low = kept - 1, high = top;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      if (static_cast<double>(mass_from<false>(middle + 1, row, law, maximum, scratch)) < enough) {
        high = middle;
      } else {
        low = middle;
      }
    }
    kept = high;
  }
  return from_ordered_key(kept);
}

// A value that at least `wanted` threads' maxima reach, so at least as many logits of the row do.
__device__ __forceinline__ float lower_bound_of_top(float thread_maximum, float row_maximum, int wanted) {
  uint32_t low = ordered_key(-kInfinity), high = ordered_key(row_maximum);
  const uint32_t mine = ordered_key(thread_maximum);
#pragma unroll 1
  for (int step = 0; step < 14 && high - low > 1; ++step) {
    const uint32_t middle = low + (high - low) / 2;
    if (__syncthreads_count(mine >= middle) >= wanted) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return from_ordered_key(low);
}

// Sorts values[0, size) in descending order; size is a power of two.
__device__ __forceinline__ void bitonic_sort(float* values, int size) {
#pragma unroll 1
  for (int span = 2; span <= size; span *= 2) {
#pragma unroll 1
    for (int stride = span / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1));
        const int high = low + stride;
        const bool descending = (low & span) == 0;
        const float a = values[low], b = values[high];
        if ((a < b) == descending) {
          values[low] = b;
          values[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Inclusive prefix sums of scratch.prefix, two values per thread.
__device__ __forceinline__ void prefix_sums(RowScratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t first = scratch.prefix[2 * threadIdx.x], second = scratch.prefix[2 * threadIdx.x + 1];
  uint64_t sum = first + second;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += below;
  }
  if (lane == 31) scratch.masses[warp] = sum;
  __syncthreads();
  const uint64_t before = warp_reduce(lane < warp ? scratch.masses[lane] : uint64_t{0}, SumOp());
  scratch.prefix[2 * threadIdx.x + 1] = before + sum;
  scratch.prefix[2 * threadIdx.x] = before + sum - second;
  __syncthreads();
}

// Sets the threshold of a row, and the total where the sorted list knows it (true). `whole` is the mass of the
// whole row, for top-p without top-k.
__device__ __forceinline__ bool search_threshold(const Row& row, const Law& law, float thread_maximum, double whole,
                                                 RowStats& stats, RowScratch& scratch) {
  constexpr int kNucleus = 256;  // a first guess; nearly all nuclei are smaller
  const int busy_threads = min(kThreads, (row.vocab_size + 3) / 4);
  const int wanted = law.top_k > 0 ? law.top_k : min(kNucleus, (busy_threads + 1) / 2);
  const float lowest = lower_bound_of_top(thread_maximum, stats.maximum, wanted);
  if (threadIdx.x == 0) scratch.count = 0;
  __syncthreads();
  const auto collect = [&](float x) {
    if (x >= lowest && x > -kInfinity) {
      const int place = atomicAdd(&scratch.count, 1);
      if (place < kCandidates) scratch.sorted[place] = x;
    }
  };
  row.for_each([&](float4 x, int) { collect(x.x), collect(x.y), collect(x.z), collect(x.w); });
  __syncthreads();
  const int count = scratch.count;
  const bool complete = lowest == -kInfinity;
  if (count > kCandidates || (law.top_k > count && !complete)) {
    stats.threshold = search_by_bisection(row, law, stats.maximum, scratch);
    return false;
  }
  int size = 64;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kThreads) scratch.sorted[i] = -kInfinity;
  bitonic_sort(scratch.sorted, size);
  const auto weight = [&](int i) { return exp2_fast((scratch.sorted[i] - stats.maximum) * law.scale); };
  for (int i = threadIdx.x; i < kCandidates; i += kThreads) {
    scratch.prefix[i] = i < count ? fixed_point(weight(i)) : 0;
  }
  __syncthreads();
  prefix_sums(scratch);

  // Everything below is decided by monotone tests on the sorted list: count how many pass.
  const auto passing = [&](auto test) {
    const int i = threadIdx.x;
    return __syncthreads_count(i < count && test(i)) +
           __syncthreads_count(i + kThreads < count && test(i + kThreads));
  };
  int keep = count;
  double mass = whole * 0x1p40;
  if (law.top_k > 0) {
    if (law.top_k < count) {
      const float last = scratch.sorted[law.top_k - 1];
      keep = passing([&](int i) { return scratch.sorted[i] >= last; });
    }
    mass = static_cast<double>(scratch.prefix[keep - 1]);
  }
  if (law.top_p < 1) {
    const double enough = law.top_p * mass;
    // The first of the values equal to sorted[i] has the mass of all strictly heavier ones before it.
    const int covered = passing([&](int i) {
      int low = 0, high = i;
      while (low < high) {
        const int middle = (low + high) / 2;
        if (scratch.sorted[middle] > scratch.sorted[i]) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return i < keep && (low == 0 || static_cast<double>(scratch.prefix[low - 1]) < enough);
    });
    if (covered == count && law.top_k == 0 && !complete) {
      stats.threshold = search_by_bisection(row, law, stats.maximum, scratch);
      return false;
    }
    keep = covered;
  }
  if (law.min_p > 0) {
    keep = min(keep, passing([&](int i) { return weight(i) >= law.min_p; }));
  }
  stats.threshold = scratch.sorted[keep - 1];
  stats.total = static_cast<double>(scratch.prefix[keep - 1]) * 0x1p-40;
  return true;
}

// Running maximum and mass of a stream of logits, four at a time.
struct Online {
  float maximum = -kInfinity;
  float reference = -FLT_MAX;  // what the mass is relative to
  float mass = 0;
  bool bad = false;

  __device__ __forceinline__ void add(float4 x, float scale) {
    bad |= !(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity);
    const float top = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    maximum = fmaxf(maximum, top);
    if (top > reference) {
      mass *= exp2_fast((reference - top) * scale);
      reference = top;
    }
    mass += (exp2_fast((x.x - reference) * scale) + exp2_fast((x.y - reference) * scale)) +
            (exp2_fast((x.z - reference) * scale) + exp2_fast((x.w - reference) * scale));
  }
};

// Statistics of a row by one block, with the threshold; every thread returns the same.
__device__ __forceinline__ RowStats row_statistics(const Row& row, const Law& law, RowScratch& scratch) {
  float thread_maximum = -kInfinity;
  bool bad = false;
  const bool needs_whole = law.top_p < 1 && law.top_k == 0;
  Online online;
  row.for_each([&](float4 x, int) {
    if (needs_whole) {
      online.add(x, law.scale);
      return;
    }
    online.bad |= !(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity);
    online.maximum = fmaxf(online.maximum, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  });
  thread_maximum = online.maximum;
  RowStats stats = {};
  stats.maximum = block_reduce(thread_maximum, MaxOp(), scratch.floats);
  bad = __syncthreads_or(online.bad);
  stats.threshold = -kInfinity;
  stats.min_weight = law.min_p;
  stats.total = 1;
  stats.valid = !bad && stats.maximum > -kInfinity;
  if (!stats.valid) return stats;
  double whole = 0;
  if (needs_whole) {
    whole = online.mass * exp2_fast((online.reference - stats.maximum) * law.scale);
    whole = block_reduce(whole, SumOp(), scratch.doubles);
  }
  const bool searches = law.top_k > 0 || law.top_p < 1;
  if (!searches || !search_threshold(row, law, thread_maximum, whole, stats, scratch)) {
    double total = 0;
    row.for_each([&](float4 x, int) {
      total += weight_of(stats, law.scale, x.x) + weight_of(stats, law.scale, x.y) +
               weight_of(stats, law.scale, x.z) + weight_of(stats, law.scale, x.w);
    });
    stats.total = block_reduce(total, SumOp(), scratch.doubles);
  }
  return stats;
}

// Statistics of tile `tile` of a row by one warp.
__device__ __forceinline__ TileStats tile_statistics(const Row& row, const Law& law, int tile) {
  constexpr int kVectors = kStatsTile / 128;
  const int first = tile * kStatsTile + static_cast<int>(threadIdx.x % 32) * 4;
  const bool vector = row.aligned();
  float4 x[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) x[j] = row.load(first + j * 128, vector);
  Online online;
  Best best = {-kInfinity, row.vocab_size};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    online.bad |= !(x[j].x < kInfinity) | !(x[j].y < kInfinity) | !(x[j].z < kInfinity) | !(x[j].w < kInfinity);
    online.maximum = fmaxf(online.maximum, fmaxf(fmaxf(x[j].x, x[j].y), fmaxf(x[j].z, x[j].w)));
  }
  TileStats stats = {warp_reduce(online.maximum, MaxOp()), 0.0f, row.vocab_size, 0};
  if (law.greedy) {
#pragma unroll
    for (int j = kVectors - 1; j >= 0; --j) {
      const int token = first + j * 128;
      if (x[j].w == stats.maximum) best.token = token + 3;
      if (x[j].z == stats.maximum) best.token = token + 2;
      if (x[j].y == stats.maximum) best.token = token + 1;
      if (x[j].x == stats.maximum) best.token = token;
    }
    stats.argmax = __reduce_min_sync(kAllLanes, best.token);
  } else {
    const float reference = fmaxf(stats.maximum, -FLT_MAX);
    float mass = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      mass += (exp2_fast((x[j].x - reference) * law.scale) + exp2_fast((x[j].y - reference) * law.scale)) +
              (exp2_fast((x[j].z - reference) * law.scale) + exp2_fast((x[j].w - reference) * law.scale));
    }
    stats.total = warp_reduce(mass, SumOp());
  }
  if (__any_sync(kAllLanes, online.bad)) stats.maximum = NAN;
  return stats;
}

// Statistics of a row from those of its tiles, by one warp; for laws that cut nothing.
__device__ __forceinline__ RowStats merge_tiles(const TileStats* tiles, int num_tiles, const Law& law,
                                                int vocab_size) {
  const int lane = threadIdx.x % 32;
  float maximum = -kInfinity;
  bool bad = false;
  for (int tile = lane; tile < num_tiles; tile += 32) {
    const float top = __ldcg(&tiles[tile].maximum);
    bad |= isnan(top);
    maximum = fmaxf(maximum, top);
  }
  maximum = warp_reduce(maximum, MaxOp());
  int argmax = vocab_size;
  double total = 0;
  for (int tile = lane; tile < num_tiles; tile += 32) {
    const float4 raw = __ldcg(reinterpret_cast<const float4*>(&tiles[tile]));
    if (law.greedy) {
      if (raw.x == maximum) argmax = min(argmax, __float_as_int(raw.z));
    } else if (raw.x > -kInfinity) {
      total += raw.y * exp2_fast((raw.x - maximum) * law.scale);
    }
  }
  RowStats stats = {};
  stats.maximum = maximum;
  stats.threshold = -kInfinity;
  stats.argmax = __reduce_min_sync(kAllLanes, argmax);
  stats.total = law.greedy ? 1.0 : warp_reduce(total, SumOp());
  stats.valid = !__any_sync(kAllLanes, bad) && maximum > -kInfinity;
  return stats;
}

}  // namespace fastspec
