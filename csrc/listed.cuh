// Top-k, top-p and min-p of a row from the largest logits of each of its slices, by one warp.
//
// The lists hold up to a thousand logits, of which few are kept. Every lane has those of its slices. The m-th largest
// of the lanes' third logits is a value that at least 3 m logits reach: these, a hundred or so, are sorted in
// registers, and a prefix sum of their weights decides. Masses are summed as in threshold.cuh.
#pragma once

#include "threshold.cuh"

namespace fastspec {

constexpr int kListed = 8;           // of the largest logits of a slice
constexpr int kFew = 4, kMany = 8;  // candidates per lane

// A logit that may tell the threshold, and which of the lists' it is.
struct Candidate {
  float logit;
  int entry;  // slice * kListed + place in its list

  __device__ __forceinline__ int slice() const { return entry / kListed; }
  __device__ __forceinline__ int place() const { return entry % kListed; }
};

// What the slices of a row report.
struct SliceLists {
  union {
    float4 largest[kListed / 4][kMaxSlices];  // in descending order
    Candidate candidates[32 * kMany];         // of these, when all have been read
  };
  float2 rest[kMaxSlices];  // the mass of the slice, and a bound of its other logits

  // What the message of that kind says about a slice: two of its largest logits, or the rest.
  __device__ __forceinline__ void keep(int kind, int slice, float2 pair) {
    if (kind < kListed / 2) {
      reinterpret_cast<float2*>(&largest[kind / 2][slice])[kind % 2] = pair;
    } else {
      rest[slice] = pair;
    }
  }
};

// One of the largest of a slice: its key in the order of floats, and where in the slice it is.
struct Taken {
  uint32_t key;
  int place;
};

// Of x[i] and x[j] the larger comes first.
template <int kCount>
__device__ __forceinline__ void put_in_order(float (&x)[kCount], int i, int j) {
  const float least = fminf(x[i], x[j]);
  x[i] = fmaxf(x[i], x[j]);
  x[j] = least;
}

// Puts sequences of kSize, each of which falls and then rises, in descending order.
template <int kSize, int kCount>
__device__ __forceinline__ void sort_bitonic(float (&x)[kCount]) {
#pragma unroll
  for (int step = kSize / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(i & step)) put_in_order(x, i, i + step);
    }
  }
}

// Puts sequences of kSize in descending order. What is merged lies mirror-inverted, so that all sorting goes one way.
template <int kSize, int kCount>
__device__ __forceinline__ void lane_sort(float (&x)[kCount]) {
  if constexpr (kSize > 1) {
    lane_sort<kSize / 2>(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(i & kSize / 2)) put_in_order(x, i, i ^ (kSize - 1));
    }
    sort_bitonic<kSize / 2>(x);
  }
}

// Puts the values of a warp in descending order; lane i gets those from kCount * i on.
template <int kCount>
__device__ __forceinline__ void warp_sort(float (&x)[kCount]) {
  const auto exchange = [](float mine, float other, int lanes) {
    return lane_index() & lanes ? fminf(mine, other) : fmaxf(mine, other);
  };
  lane_sort<kCount>(x);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    float mirrored[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) mirrored[i] = __shfl_xor_sync(kAllLanes, x[kCount - 1 - i], 2 * lanes - 1);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = exchange(x[i], mirrored[i], lanes);
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] = exchange(x[i], __shfl_xor_sync(kAllLanes, x[i], step), step);
    }
    sort_bitonic<kCount>(x);
  }
}

// The kRank-th largest of two lists, each in descending order.
template <int kRank>
__device__ __forceinline__ float ranked(const float (&a)[kListed], const float (&b)[kListed]) {
  float found = fmaxf(a[kRank - 1], b[kRank - 1]);
#pragma unroll
  for (int i = 1; i < kRank; ++i) found = fmaxf(found, fminf(a[i - 1], b[kRank - 1 - i]));
  return found;
}

// The lists of a lane's slices: of kCount of them, 32 apart.
template <int kCount>
struct LaneLists {
  float logits[kCount][kListed];
  float masses[kCount];
  float others;  // no less than what is not listed

  __device__ __forceinline__ LaneLists(const SliceLists& lists, int num_slices) : others(-kInfinity) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int slice = i * 32 + lane_index();
      const bool inside = slice < num_slices;
#pragma unroll
      for (int j = 0; j < kListed; j += 4) {
        float4 four = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        if (inside) four = lists.largest[j / 4][slice];
        logits[i][j] = four.x, logits[i][j + 1] = four.y, logits[i][j + 2] = four.z, logits[i][j + 3] = four.w;
      }
      float2 rest = {0.0f, -kInfinity};
      if (inside) rest = lists.rest[slice];
      masses[i] = rest.x;
      others = fmaxf(others, rest.y);
    }
  }

  __device__ __forceinline__ float maximum() const {
    float top = logits[0][0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, logits[i][0]);
    return warp_max(top);
  }
  // The mass of the row relative to its maximum.
  __device__ __forceinline__ float mass(float maximum, float scale) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (logits[i][0] > -kInfinity || isnan(masses[i])) sum += masses[i] * exp2_fast((logits[i][0] - maximum) * scale);
    }
    return warp_sum(sum);
  }
  // The kRank-th largest of the lane.
  template <int kRank>
  __device__ __forceinline__ float sample() const {
    if constexpr (kCount == 2) {
      return ranked<kRank>(logits[0], logits[1]);
    } else {
      float merged[2][kListed];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kListed; ++j) merged[i][j] = fmaxf(logits[i][j], logits[i + 2][kListed - 1 - j]);
        sort_bitonic<kListed>(merged[i]);
      }
      return ranked<kRank>(merged[0], merged[1]);
    }
  }
};

// Logits that are enough to tell a threshold, in lists.candidates, and what is known of all.
struct Choice {
  int count;      // of the candidates; more than there is room for if there were too many
  float lowest;   // all in the lists that reach it are among them
  float maximum;  // of the row
  float others;   // no less than all that is not in the lists
  float mass;     // of the row, relative to its maximum

  __device__ __forceinline__ bool is_law() const { return mass < kInfinity && maximum > -kInfinity; }
};

// At least k of the logits, if there is a k; if they would be too many, fewer.
template <int kCount>
__device__ __forceinline__ Choice choose_candidates(SliceLists& lists, int num_slices, const Law& law) {
  constexpr int kMost = 72;      // of k, for which the third logits do
  constexpr int kNucleus = 112;  // without a k; twice as many will be found
  const LaneLists<kCount> lane(lists, num_slices);
  Choice choice = {0, -kInfinity, lane.maximum(), warp_max(lane.others), 0};
  choice.mass = lane.mass(choice.maximum, law.scale);
  if (!choice.is_law()) return choice;
  const bool few = law.top_k > 0 && law.top_k <= kMost;
  const float sample = few ? lane.template sample<3>() : lane.template sample<kListed>();
  int wanted = few ? (law.top_k + 2) / 3 : ((law.top_k > 0 ? law.top_k : kNucleus) + 7) / 8;
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) rank += __shfl_sync(kAllLanes, sample, i) > sample;
  float lowest;
  int mine, place;
#pragma unroll 1
  do {
    choice.lowest = from_ordered_key(__reduce_min_sync(kAllLanes, rank < wanted ? ordered_key(sample) : UINT32_MAX));
    lowest = fmaxf(choice.lowest, -FLT_MAX);
    mine = choice.count = place = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kListed; ++j) mine += lane.logits[i][j] >= lowest;
    }
#pragma unroll
    for (int bit = 1; bit <= kCount * kListed; bit *= 2) {
      const uint32_t lanes = __ballot_sync(kAllLanes, mine & bit);
      choice.count += bit * __popc(lanes);
      place += bit * num_before(lanes);
    }
    wanted -= 2;
  } while (choice.count > 32 * kMany && wanted > 0);
  if (choice.count > 32 * kMany) return choice;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kListed; ++j) {
      if (lane.logits[i][j] < lowest) continue;
      lists.candidates[place++] = {lane.logits[i][j], (i * 32 + lane_index()) * kListed + j};
    }
  }
  __syncwarp();
  return choice;
}

// x[index] for an index that only the kernel knows, of values in registers.
template <typename T, int kCount>
__device__ __forceinline__ T pick(const T (&x)[kCount], int index) {
  T halved[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) halved[i] = x[i];
#pragma unroll
  for (int step = kCount / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) halved[i] = index & step ? halved[i + step] : halved[i];
  }
  return halved[0];
}

// The candidates in descending order, lane i has those from kCount * i on, -inf beyond the last; and their masses.
template <int kCount>
struct Sorted {
  float logits[kCount];
  uint64_t masses[kCount];  // of all up to each
  uint64_t first;           // of all before this lane's

  __device__ __forceinline__ Sorted(const Candidate* candidates, const Choice& choice, float scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int entry = i * 32 + lane_index();
      logits[i] = entry < choice.count ? candidates[entry].logit : -kInfinity;
    }
    warp_sort(logits);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum += fixed_point(exp2_fast((logits[i] - choice.maximum) * scale));
      masses[i] = sum;
    }
    uint64_t lanes_before = sum;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, lanes_before, lanes);
      if (lane_index() >= lanes) lanes_before += other;
    }
    lanes_before -= sum;
#pragma unroll
    for (int i = 0; i < kCount; ++i) masses[i] += lanes_before;
    first = lanes_before;
  }

  __device__ __forceinline__ float at(int place) const {
    return __shfl_sync(kAllLanes, pick(logits, place % kCount), place / kCount);
  }
  // The mass of all that reach a value, at least one.
  __device__ __forceinline__ uint64_t reaching(float lowest) const {
    int last = -1;
#pragma unroll
    for (int i = 0; i < kCount; ++i) last += __popc(__ballot_sync(kAllLanes, logits[i] >= lowest));
    return __shfl_sync(kAllLanes, pick(masses, last % kCount), last / kCount);
  }
};

// The threshold and the mass of what is kept. False if the candidates do not tell.
template <int kCount>
__device__ __forceinline__ bool search_sorted(const SliceLists& lists, const Choice& choice, const Law& law,
                                              RowStats& stats) {
  const float others = choice.others;
  const Sorted<kCount> sorted(lists.candidates, choice, law.scale);
  const uint64_t all = __shfl_sync(kAllLanes, sorted.masses[kCount - 1], 31);
  const auto weight = [&](float x) { return exp2_fast((x - choice.maximum) * law.scale); };
  float lowest = -FLT_MAX;
  double mass = choice.mass * 0x1p40;
  if (law.top_k > 0) {  // what ties with the k-th is kept, and top-p is a share of all that
    if (choice.count < law.top_k) {
      if (choice.lowest > -kInfinity || others > -kInfinity) return false;
      mass = static_cast<double>(all);
    } else {
      lowest = sorted.at(law.top_k - 1);
      if (!(lowest > others)) return false;
      mass = static_cast<double>(sorted.reaching(lowest));
    }
  }
  // Integers below it are less than top_p of the mass.
  const uint64_t enough = law.top_p < 1 ? __double2ull_ru(law.top_p * mass) : UINT64_MAX;
  uint32_t by_mass = UINT32_MAX, kept = UINT32_MAX;
  bool too_light = false;  // for min-p
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float x = sorted.logits[i];
    const bool light = weight(x) < law.min_p;
    too_light |= x > -kInfinity && light;
    const uint64_t heavier = i == 0 ? sorted.first : sorted.masses[i - 1];
    if (x >= lowest && (heavier == 0 || heavier < enough)) {
      by_mass = ordered_key(x);
      if (!light) kept = ordered_key(x);
    }
  }
  const uint32_t threshold = __reduce_min_sync(kAllLanes, kept);
  if (law.top_k == 0) {
    // No token beyond the candidates, or between them, may be part of the nucleus and heavy enough for min-p.
    const bool lists_suffice = others == -kInfinity || weight(others) < law.min_p;
    const bool ends = __any_sync(kAllLanes, too_light) || all >= enough;
    const float least = from_ordered_key(__reduce_min_sync(kAllLanes, by_mass));
    if (!ends && !(lists_suffice && choice.lowest == -kInfinity)) return false;
    if (!lists_suffice && !(least > others)) return false;
  }
  const float least_kept = from_ordered_key(threshold);
  const float kept_mass = static_cast<float>(sorted.reaching(least_kept)) * 0x1p-40f;
  if (lane_index() == 0) stats.threshold = least_kept, stats.inverse_mass = 1.0f / kept_mass;
  return true;
}

constexpr int kNotTold = -1;

// Statistics of a row under a law that cuts, written by one lane. Returns the number of candidates, among which is all
// that is kept; kNotTold, to all, if the lists do not tell.
static __device__ __noinline__ int search_lists(SliceLists& lists, int num_slices, const Law& law, RowStats& stats) {
  __builtin_assume(__isShared(&lists));
  __builtin_assume(__isShared(&law));
  __builtin_assume(__isShared(&stats));
  const Choice choice =
      num_slices > 64 ? choose_candidates<4>(lists, num_slices, law) : choose_candidates<2>(lists, num_slices, law);
  if (lane_index() == 0) stats = {choice.maximum, -kInfinity, law.min_p, 0.0f, 0, choice.is_law()};
  if (!choice.is_law()) return 0;
  bool found = false;
  if (choice.count <= 32 * kFew) {
    found = search_sorted<kFew>(lists, choice, law, stats);
  } else if (choice.count <= 32 * kMany) {
    found = search_sorted<kMany>(lists, choice, law, stats);
  }
  return found ? choice.count : kNotTold;
}

}  // namespace fastspec
