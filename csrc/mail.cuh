// Messages between the blocks of a group, through device memory: 8 bytes and the number of the exchange they belong to,
// stored and loaded as one. Who waits for a message polls it, and has its content with the poll that finds it: no
// fence, no flag beside it, no counter to reset. The numbers grow from launch to launch, so what an earlier exchange
// left behind is never taken for an answer.
#pragma once

#include <cstdint>

#include "patience.cuh"
#include "reduce.cuh"

namespace fastspec {

struct alignas(16) Message {
  uint64_t content, number;
};

__device__ __forceinline__ uint64_t content_of(float first, float second) {
  return static_cast<uint64_t>(__float_as_uint(second)) << 32 | __float_as_uint(first);
}
__device__ __forceinline__ float first_of(uint64_t content) { return __uint_as_float(static_cast<uint32_t>(content)); }
__device__ __forceinline__ float second_of(uint64_t content) {
  return __uint_as_float(static_cast<uint32_t>(content >> 32));
}

__device__ __forceinline__ void send(Message* to, uint64_t content, uint64_t number) {
  asm volatile(
      "{\n"
      ".reg .b128 message;\n"
      "mov.b128 message, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], message;\n"
      "}" ::"l"(to),
      "l"(content), "l"(number)
      : "memory");
}

__device__ __forceinline__ Message look(const Message* at) {
  Message message;
  asm volatile(
      "{\n"
      ".reg .b128 message;\n"
      "ld.relaxed.gpu.global.b128 message, [%2];\n"
      "mov.b128 {%0, %1}, message;\n"
      "}"
      : "=l"(message.content), "=l"(message.number)
      : "l"(at)
      : "memory");
  return message;
}

// Waits for the messages at `at(i)` where `wanted(i)`, all of the same exchange. The others are read as well, so that
// there is no branch and no register waits for a load that may not come; what they say is of no meaning.
template <int kCount, typename Wanted, typename At>
__device__ __forceinline__ void receive(uint64_t (&contents)[kCount], uint64_t number, Wanted wanted, At at) {
  Patience patience("a message of exchange", static_cast<int>(number & 0xffff));
  bool missing;
  do {
    missing = false;
    Message messages[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) messages[i] = look(at(i));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      missing |= wanted(i) && messages[i].number != number;
      contents[i] = messages[i].content;
    }
    patience.poll();
  } while (missing);
}

}  // namespace fastspec
