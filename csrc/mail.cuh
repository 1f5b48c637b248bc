// Messages between the blocks of a group, through device memory: 8 bytes and the number of the exchange they belong to,
// stored and loaded as one. Who waits for a message polls it, and has its content with the poll that finds it: no
// fence, no flag beside it, no counter to reset. The numbers grow from launch to launch, so what an earlier exchange
// left behind is never taken for an answer.
#pragma once

#include <cstdint>

#include "patience.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

namespace fastspec {

struct alignas(16) Message {
  uint64_t content, number;
};

// A number is that of the launch and, below it, that of the exchange; or, with a bit of its own, what else the message
// has to say.
constexpr int kPayloadBits = 22, kNumberBits = kPayloadBits + 1;
constexpr uint32_t kPayload = (1u << kPayloadBits) - 1;
__device__ __forceinline__ uint64_t exchange_number(uint64_t launch, int exchange) {
  return launch << kNumberBits | static_cast<uint32_t>(exchange);
}
__device__ __forceinline__ uint64_t payload_number(uint64_t launch, uint32_t payload) {
  return launch << kNumberBits | 1u << kPayloadBits | payload;
}
__device__ __forceinline__ uint32_t payload_of(const Message& message) {
  return static_cast<uint32_t>(message.number) & kPayload;
}

__device__ __forceinline__ uint64_t content_of(float first, float second) {
  return static_cast<uint64_t>(__float_as_uint(second)) << 32 | __float_as_uint(first);
}
__device__ __forceinline__ float first_of(uint64_t content) { return __uint_as_float(static_cast<uint32_t>(content)); }
__device__ __forceinline__ float second_of(uint64_t content) {
  return __uint_as_float(static_cast<uint32_t>(content >> 32));
}

__device__ __forceinline__ void send(Message* to, uint64_t content, uint64_t number) {
  store_pair(to, content, number);
}

__device__ __forceinline__ Message look(const Message* at) {
  Message message;
  load_pair(at, message.content, message.number);
  return message;
}

// By a whole warp: waits for the messages at `at(i)` where `wanted(i)`, all of the exchange that `expected(number)`
// knows. The others are read as well, so that there is no branch and no register waits for a load that may not come;
// what they say is of no meaning.
template <int kCount, typename Expected, typename Wanted, typename At>
__device__ __forceinline__ void receive(Message (&messages)[kCount], Expected expected, Wanted wanted, At at) {
  Patience patience("messages, the first of which is at", static_cast<int>(reinterpret_cast<uintptr_t>(at(0))));
  bool missing;
  do {
    missing = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) messages[i] = look(at(i));
    __syncwarp();  // or the compiler waits for some before it asks for the others
#pragma unroll
    for (int i = 0; i < kCount; ++i) missing |= wanted(i) && !expected(messages[i].number);
    patience.poll();
  } while (__any_sync(kAllLanes, missing));
}
template <int kCount, typename Wanted, typename At>
__device__ __forceinline__ void receive(uint64_t (&contents)[kCount], uint64_t number, Wanted wanted, At at) {
  Message messages[kCount];
  receive(messages, [&](uint64_t found) { return found == number; }, wanted, at);
#pragma unroll
  for (int i = 0; i < kCount; ++i) contents[i] = messages[i].content;
}
// Those whose numbers are of the launch and have a payload.
template <int kCount, typename Wanted, typename At>
__device__ __forceinline__ void receive_payloads(Message (&messages)[kCount], uint64_t launch, Wanted wanted, At at) {
  const uint64_t expected = payload_number(launch, 0);
  receive(messages, [&](uint64_t found) { return ((found ^ expected) & ~uint64_t{kPayload}) == 0; }, wanted, at);
}

}  // namespace fastspec
