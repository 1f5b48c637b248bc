// The host's side of a verification: how it is dealt out, and for which element type.
#include <algorithm>

#include "context.cuh"
#include "launch.cuh"

namespace fastspec {

template <LogitType kType>
int launch_verify(const VerifyParams& params, void* stream);  // verify_kernel.cuh

Slicing::Slicing(int vocab_size) {
  num_tiles = (vocab_size + kTile - 1) / kTile;
  tiles_per_slice = (num_tiles + kMaxSlices - 1) / kMaxSlices;
  num_slices = (num_tiles + tiles_per_slice - 1) / tiles_per_slice;
}

int64_t verify_mail_size(int num_rows, int vocab_size) {
  const int slices = Slicing(vocab_size).num_slices;
  // After the last message may be read, though not used, what would be of slices that do not exist.
  return 1 + kMaxSlices + 2 * (kKinds * num_rows * slices + 2 * num_rows + 2 * kNumRequests * kPhases * slices);
}

int verify_group_size(int batch_size, int vocab_size) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  return std::max(1, std::min(processors / batch_size, Slicing(vocab_size).num_slices));
}

int verify(const VerifyParams& params, void* stream) {
  return for_type(params.logit_type, [&](auto type) { return launch_verify<decltype(type)::value>(params, stream); });
}

}  // namespace fastspec
