#include "verify_kernel.cuh"

namespace fastspec {

template int launch_verify<LogitType::kFloat>(const VerifyParams& params, void* stream);

}  // namespace fastspec
