#include "pass_kernel.cuh"

namespace fastspec {

int pass_bfloat16(const PassParams& params, const PassCall& call, void* stream) {
  return launch_pass<__nv_bfloat16>(params, call, stream);
}

}  // namespace fastspec
