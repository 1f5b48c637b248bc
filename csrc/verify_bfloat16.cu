#include "verify_kernel.cuh"

namespace fastspec {

template int launch_verify<LogitType::kBfloat16>(const VerifyParams& params, void* stream);

}  // namespace fastspec
