// What only PTX or nvcc can say, of verification and proposals. Where these are emulated, on a CPU, tests/emulator says
// it in C++.
#pragma once

#ifndef FASTSPEC_EMULATED

#include <cstdint>

namespace fastspec {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What lies at an address if it may be read, else `nothing` in all its words.
__device__ __forceinline__ float4 load_if(bool inside, const float4* at, float nothing) {
  float4 x;
  asm volatile(
      "{\n"
      ".reg .pred inside;\n"
      "setp.ne.s32 inside, %4, 0;\n"
      "mov.f32 %0, %6;\n"
      "mov.f32 %1, %6;\n"
      "mov.f32 %2, %6;\n"
      "mov.f32 %3, %6;\n"
      "@inside ld.global.v4.f32 {%0, %1, %2, %3}, [%5];\n"
      "}"
      : "=&f"(x.x), "=&f"(x.y), "=&f"(x.z), "=&f"(x.w)
      : "r"(static_cast<int>(inside)), "l"(at), "f"(nothing));
  return x;
}
__device__ __forceinline__ uint2 load_if(bool inside, const uint2* at, uint32_t nothing) {
  uint2 x;
  asm volatile(
      "{\n"
      ".reg .pred inside;\n"
      "setp.ne.s32 inside, %2, 0;\n"
      "mov.b32 %0, %4;\n"
      "mov.b32 %1, %4;\n"
      "@inside ld.global.v2.b32 {%0, %1}, [%3];\n"
      "}"
      : "=&r"(x.x), "=&r"(x.y)
      : "r"(static_cast<int>(inside)), "l"(at), "r"(nothing));
  return x;
}

// 16 bytes of device memory, stored and loaded as one.
__device__ __forceinline__ void store_pair(void* to, uint64_t first, uint64_t second) {
  asm volatile(
      "{\n"
      ".reg .b128 pair;\n"
      "mov.b128 pair, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], pair;\n"
      "}" ::"l"(to),
      "l"(first), "l"(second)
      : "memory");
}
__device__ __forceinline__ void load_pair(const void* at, uint64_t& first, uint64_t& second) {
  asm volatile(
      "{\n"
      ".reg .b128 pair;\n"
      "ld.relaxed.gpu.global.b128 pair, [%2];\n"
      "mov.b128 {%0, %1}, pair;\n"
      "}"
      : "=l"(first), "=l"(second)
      : "l"(at)
      : "memory");
}

// The shared memory of which the launch has given the size.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// What precedes the kernel in the stream has written its inputs. What follows it may be set up from here on.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace fastspec

#endif  // FASTSPEC_EMULATED
