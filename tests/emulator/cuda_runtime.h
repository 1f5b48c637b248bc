// CUDA for a C++ compiler: what the kernels of verification and proposals need, run on a CPU by emulator.cpp. A lane is
// a fiber, a block a thread of the host; one of all runs at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <semaphore>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define FASTSPEC_EMULATED

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local
#define __builtin_assume(condition) static_cast<void>(0)

using std::isnan;
using std::max;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

extern thread_local dim3 threadIdx, blockIdx, gridDim;

namespace emulator {

// Lets others go on.
void yield();
// What all lanes of the warp bring to a collective operation; all must come to the same.
enum Operation { kShuffle, kShuffleXor, kShuffleUp, kShuffleDown, kBallot, kMax, kMin, kSync };
const uint64_t* gather(Operation operation, uint64_t value);
// __syncthreads_or().
int meet(int value);
unsigned char* dynamic_shared();
// Runs all blocks; 0, or an error if some wait for what never comes.
int launch(dim3 grid, unsigned threads, const std::function<void()>& kernel);

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Shuffles values of up to 8 bytes; source(lane) is the lane that each gets its value from.
template <typename T, typename Source>
T shuffle(Operation operation, T value, Source source) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(value));
  const uint64_t* const values = gather(operation, word);
  std::memcpy(&value, &values[source(static_cast<int>(threadIdx.x % 32))], sizeof(value));
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t, T value, int source) {
  return emulator::shuffle(emulator::kShuffle, value, [&](int) { return source & 31; });
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return emulator::shuffle(emulator::kShuffleXor, value, [&](int lane) { return (lane ^ mask) & 31; });
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int delta) {
  return emulator::shuffle(emulator::kShuffleUp, value, [&](int lane) { return lane < delta ? lane : lane - delta; });
}
template <typename T>
T __shfl_down_sync(uint32_t, T value, int delta) {
  return emulator::shuffle(emulator::kShuffleDown, value,
                           [&](int lane) { return lane + delta > 31 ? lane : lane + delta; });
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const uint64_t* const values = emulator::gather(emulator::kBallot, predicate);
  uint32_t lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= static_cast<uint32_t>(values[lane]) << lane;
  return lanes;
}
inline bool __any_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const uint64_t* const values = emulator::gather(emulator::kMax, value);
  return static_cast<uint32_t>(*std::max_element(values, values + 32));
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  const uint64_t* const values = emulator::gather(emulator::kMin, value);
  return static_cast<uint32_t>(*std::min_element(values, values + 32));
}
inline int __reduce_min_sync(uint32_t mask, int value) {
  constexpr uint32_t kSign = 0x80000000u;  // flipped, the integers are in the order of the unsigned ones
  return static_cast<int>(__reduce_min_sync(mask, static_cast<uint32_t>(value) ^ kSign) ^ kSign);
}
inline void __syncwarp() { emulator::gather(emulator::kSync, 0); }
inline void __syncthreads() { emulator::meet(0); }
inline int __syncthreads_or(int predicate) { return emulator::meet(predicate); }

// One lane runs at a time.
template <typename T, typename U>
T atomicAdd(T* at, U value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <typename T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}

inline float __uint_as_float(uint32_t x) { return emulator::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits<uint32_t>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
inline float __ull2float_rn(uint64_t x) { return static_cast<float>(x); }
inline unsigned long long __float2ull_rz(float x) { return static_cast<unsigned long long>(x); }
inline unsigned long long __double2ull_ru(double x) { return static_cast<unsigned long long>(std::ceil(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline bool __isShared(const void*) { return true; }
inline long long clock64() { return 0; }

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }

// The host's side, of a card of sm_80 with a few multiprocessors.
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchTimeout = 702, cudaErrorNotSupported = 801 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed, cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};
constexpr int kSharedBytes = 227 << 10;
constexpr int kMultiprocessors = 20;
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? kMultiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kSharedBytes
                                                                  : 8;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "the emulated launch failed; stderr says why"; }
constexpr int CUDART_VERSION = 13000;
inline int cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
template <typename Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
template <typename Kernel>
int cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = 0, cudaSuccess;
}
template <typename Kernel, typename... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Arguments&... arguments) {
  return emulator::launch(config->gridDim, config->blockDim.x, [&] { kernel(arguments...); });
}

// csrc/ptx.cuh.
namespace fastspec {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float log2_fast(float x) { return std::log2(x); }
inline float4 load_if(bool inside, const float4* at, float nothing) {
  return inside ? *at : float4{nothing, nothing, nothing, nothing};
}
inline uint2 load_if(bool inside, const uint2* at, uint32_t nothing) { return inside ? *at : uint2{nothing, nothing}; }
inline void store_pair(void* to, uint64_t first, uint64_t second) {
  static_cast<uint64_t*>(to)[0] = first, static_cast<uint64_t*>(to)[1] = second;
}
inline void load_pair(const void* at, uint64_t& first, uint64_t& second) {
  emulator::yield();  // who polls
  first = static_cast<const uint64_t*>(at)[0], second = static_cast<const uint64_t*>(at)[1];
}
inline unsigned char* dynamic_shared() { return emulator::dynamic_shared(); }
inline void wait_for_inputs() {}

}  // namespace fastspec
