#include "pass_kernel.cuh"

namespace fastspec {

int pass_half(const PassParams& params, const PassCall& call, void* stream) {
  return launch_pass<__half>(params, call, stream);
}

}  // namespace fastspec
