#include "verify_kernel.cuh"

namespace fastspec {

template int launch_verify<LogitType::kHalf>(const VerifyParams& params, void* stream);

}  // namespace fastspec
