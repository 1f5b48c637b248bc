// Top-k, top-p and min-p of a row as one threshold on its logits, found by one block without sorting the row.
//
//   1. every thread takes the maximum of its share; the r-th largest of these in each warp, the least over the warps,
//      is a value that at least r * kWarps tokens reach
//   2. the tokens that reach it are collected, a few hundred; each counts the heavier ones, which is its rank
//   3. a prefix sum of the weights by rank decides what top-k, top-p and min-p keep
//
// Rows so flat, or so full of ties, that this does not suffice are searched by bisection over all float values.
// Masses are summed as integers: no order of summation can change them.
#pragma once

#include "rows.cuh"

namespace fastspec {

constexpr int kCandidates = kThreads;

// Memory that the threads of a block share for it.
struct ThresholdScratch {
  float maxima[kWarps];
  float bounds[kWarps];
  double doubles[kWarps];
  uint64_t masses[kWarps];
  uint32_t keys[kWarps];
  int count;
  float mass;
  alignas(16) float candidates[kCandidates];
  float by_rank[kCandidates];
  unsigned long long weights[kCandidates];
};

// The row of a tree node as a block reads it, kUnroll loads of each thread under way at a time.
template <LogitType kType, int kUnroll>
struct BlockRow {
  Row<kType> row;
  const Penalties* penalties;
  int node, depth;

  // Calls visit(x) with four logits at a time, this thread's share of the row; the same share at every call.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    constexpr int kStep = kThreads * 4;
    const bool vector = row.vectors(), penalised = penalties->touch(depth);
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x) * 4; first < row.vocab_size; first += kUnroll * kStep) {
      float4 x[kUnroll];
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) x[j] = row.load(first + j * kStep, vector);
#pragma unroll
      for (int j = 0; j < kUnroll; ++j) {
        if (penalised) x[j] = penalise(x[j], *penalties, first + j * kStep, node, depth, row.vocab_size);
        visit(x[j]);
      }
    }
  }
};

__device__ __forceinline__ uint64_t fixed_point(float weight) { return __float2ull_rz(weight * 0x1p40f); }

// The mass of the logits whose ordered key is at least `key`, or their number.
template <bool kCount, typename SomeRow>
__device__ __forceinline__ uint64_t mass_from(uint32_t key, const SomeRow& row, const Law& law, float maximum,
                                              ThresholdScratch& scratch) {
  uint64_t mass = 0;
  const auto add = [&](float x) {
    if (ordered_key(x) >= key) mass += kCount ? 1 : fixed_point(exp2_fast((x - maximum) * law.scale));
  };
  row.for_each([&](float4 x) { add(x.x), add(x.y), add(x.z), add(x.w); });
  return block_sum(mass, scratch.masses);
}

// The threshold of top-k and top-p by bisection, a pass over the row for each bit.
template <typename SomeRow>
static __device__ __noinline__ float search_by_bisection(SomeRow row, Law law, float maximum,
                                                         ThresholdScratch& scratch) {
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

// Steps 2 and 3 for a list of all tokens that reach a bound; `whole` is the mass of the row where top-p needs it.
// False if the list is too short to tell.
__device__ __forceinline__ bool search_candidates(const Law& law, int count, bool complete, double whole,
                                                  RowStats& stats, ThresholdScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < count) {
    const float mine = scratch.candidates[thread];
    int rank = 0;  // ties share a rank
#pragma unroll 4
    for (int i = 0; i < count; i += 4) {  // -inf fills the list
      const float4 others = *reinterpret_cast<const float4*>(&scratch.candidates[i]);
      rank += (others.x > mine) + (others.y > mine) + (others.z > mine) + (others.w > mine);
    }
    atomicExch(&scratch.by_rank[rank], mine);  // ties all write the same
    atomicAdd(&scratch.weights[rank], fixed_point(exp2_fast((mine - stats.maximum) * law.scale)));
  }
  __syncthreads();

  // From here on thread i stands for rank i.
  const uint64_t weight = scratch.weights[thread];
  uint64_t heavier = weight;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, heavier, offset);
    if (lane_index() >= offset) heavier += below;
  }
  if (lane_index() == 31) scratch.masses[warp_index()] = heavier;
  const bool taken = thread < count && scratch.by_rank[thread] > -kInfinity;
  bool kept = taken && (law.top_k == 0 || thread < law.top_k);
  __syncthreads();
  heavier -= weight;
  for (int warp = 0; warp < warp_index(); ++warp) heavier += scratch.masses[warp];
  double enough = law.top_p * (whole * 0x1p40);
  if (law.top_k > 0) {
    // The last rank below k knows the mass of all.
    const int last = min(law.top_k, count) - 1;
    if (thread == last) scratch.doubles[0] = static_cast<double>(heavier + weight);
    __syncthreads();
    enough = law.top_p * scratch.doubles[0];
  }
  if (law.top_p < 1) kept = kept && (heavier == 0 || static_cast<double>(heavier) < enough);
  // The lightest candidate is kept: there may be more of the nucleus beyond the list.
  const bool open = law.top_p < 1 && law.top_k == 0 && !complete;
  const uint64_t listed = heavier + weight;
  const bool short_of = open && thread == count - 1 && static_cast<double>(listed) < enough;
  if (law.min_p > 0) kept = kept && exp2_fast((scratch.by_rank[thread] - stats.maximum) * law.scale) >= law.min_p;
  const uint32_t key = kept ? ordered_key(scratch.by_rank[thread]) : UINT32_MAX;
  const uint32_t least = __reduce_min_sync(kAllLanes, key);
  if (lane_index() == 0) scratch.keys[warp_index()] = least;
  if (__syncthreads_or(short_of)) return false;
  const uint32_t threshold = __reduce_min_sync(kAllLanes, scratch.keys[lane_index() % kWarps]);
  if (kept && key == threshold) scratch.mass = static_cast<float>(listed) * 0x1p-40f;
  __syncthreads();
  stats.threshold = from_ordered_key(threshold);
  stats.inverse_mass = 1.0f / scratch.mass;
  return true;
}

// Where a search begins: the row's maximum, and a value that enough tokens reach. Also clears the lists.
struct Bounds {
  float maximum, lowest;
};

// From the largest logit of every thread.
__device__ __forceinline__ Bounds find_bounds(float top, const Law& law, ThresholdScratch& scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kNucleus = 128;  // a guess of the list that top-p needs; few nuclei are larger
  const int wanted = law.top_k > 0 ? law.top_k : kNucleus;
  uint32_t key = ordered_key(top), bound = key;
#pragma unroll 1
  for (int taken = 0; taken < wanted; taken += kWarps) {
    bound = __reduce_max_sync(kAllLanes, key);
    if (taken == 0 && lane_index() == 0) scratch.maxima[warp_index()] = from_ordered_key(bound);
    if (bound == ordered_key(-kInfinity)) break;
    if (key == bound) key = ordered_key(-kInfinity);
  }
  if (lane_index() == 0) scratch.bounds[warp_index()] = from_ordered_key(bound);
  if (thread == 0) scratch.count = 0;
  scratch.weights[thread] = 0;
  scratch.by_rank[thread] = -kInfinity;
  scratch.candidates[thread] = -kInfinity;
  __syncthreads();
  const int lane = lane_index() % kWarps;
  return {warp_max(scratch.maxima[lane]), -warp_max(-scratch.bounds[lane])};
}

// Steps 2 and 3: collects the tokens that reach a bound, and searches them.
template <typename SomeRow>
__device__ __forceinline__ bool search(const SomeRow& row, float top, float lowest, bool complete, double whole,
                                       const Law& law, RowStats& stats, ThresholdScratch& scratch) {
  if (top >= lowest && top > -kInfinity) {
    const auto collect = [&](float x) {
      if (x >= lowest && x > -kInfinity) {
        const int place = atomicAdd(&scratch.count, 1);
        if (place < kCandidates) scratch.candidates[place] = x;
      }
    };
    row.for_each([&](float4 x) { collect(x.x), collect(x.y), collect(x.z), collect(x.w); });
  }
  __syncthreads();
  const int count = scratch.count;
  return count <= kCandidates && (complete || law.top_k <= count) &&
         search_candidates(law, count, complete, whole, stats, scratch);
}

// Statistics of a row under a law that cuts; every thread of the block returns the same.
template <typename SomeRow>
static __device__ __noinline__ RowStats cut_statistics(SomeRow row, Law law, ThresholdScratch& scratch) {
  const bool needs_whole = law.top_p < 1 && law.top_k == 0;
  float top = -kInfinity;
  bool bad = false;
  row.for_each([&](float4 x) {
    bad |= !(x.x < kInfinity) | !(x.y < kInfinity) | !(x.z < kInfinity) | !(x.w < kInfinity);
    top = fmaxf(top, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
  });
  bad = __syncthreads_or(bad);
  const Bounds bounds = find_bounds(top, law, scratch);
  const float maximum = bounds.maximum;
  RowStats stats = {maximum, -kInfinity, law.min_p, 0.0f, 0, !bad && maximum > -kInfinity};
  if (!stats.valid) return stats;

  const bool searches = law.top_k > 0 || law.top_p < 1;
  double whole = 0;
  if (needs_whole || !searches) {
    double mass = 0;
    const auto add = [&](float x) {
      const float weight = stats.weight(law.scale, x);
      mass += needs_whole ? exp2_fast((x - maximum) * law.scale) : weight;
    };
    row.for_each([&](float4 x) { add(x.x), add(x.y), add(x.z), add(x.w); });
    whole = block_sum(mass, scratch.doubles);
  }
  if (!searches) {
    stats.inverse_mass = static_cast<float>(1.0 / whole);
    return stats;
  }
  const bool complete = bounds.lowest == -kInfinity;
  if (search(row, top, bounds.lowest, complete, whole, law, stats, scratch)) return stats;
  stats.threshold = search_by_bisection(row, law, maximum, scratch);
  double mass = 0;
  row.for_each([&](float4 x) {
    mass += (stats.weight(law.scale, x.x) + stats.weight(law.scale, x.y)) +
            (stats.weight(law.scale, x.z) + stats.weight(law.scale, x.w));
  });
  stats.inverse_mass = static_cast<float>(1.0 / block_sum(mass, scratch.doubles));
  return stats;
}

}  // namespace fastspec
