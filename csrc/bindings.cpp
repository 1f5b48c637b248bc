// The Python module fastspec._C: pointers, sizes and a stream in, an exception on failure.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int code, const char* what) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(code)));
}

fastspec::SamplingParams sampling_params(std::uintptr_t temperature, std::uintptr_t top_k, std::uintptr_t top_p,
                                         std::uintptr_t min_p, std::uintptr_t repetition_penalty,
                                         std::uintptr_t min_tokens, std::uintptr_t seed, std::uintptr_t eos_token_ids,
                                         std::uintptr_t seen) {
  return {pointer<const double>(temperature),
          pointer<const int64_t>(top_k),
          pointer<const double>(top_p),
          pointer<const double>(min_p),
          pointer<const double>(repetition_penalty),
          pointer<const int64_t>(min_tokens),
          pointer<const int64_t>(seed),
          pointer<const int64_t>(eos_token_ids),
          pointer<const uint8_t>(seen)};
}

void verify(std::uintptr_t target_logits, int logit_type, int64_t target_stride, std::uintptr_t draft_logits,
            std::uintptr_t tokens, int64_t tokens_stride, std::uintptr_t tree, std::uintptr_t positions,
            const fastspec::SamplingParams& sampling, std::uintptr_t path, std::uintptr_t num_accepted,
            std::uintptr_t next_token, std::uintptr_t invalid, int batch_size, int num_nodes, int num_inner,
            int max_depth, int vocab_size, int root_ahead, int root_inner_ahead, int rule, int cluster_size,
            std::uintptr_t clock, std::uintptr_t stream) {
  const fastspec::VerifyParams params = {.target_logits = pointer<const void>(target_logits),
                                         .draft_logits = pointer<const float>(draft_logits),
                                         .tokens = pointer<const int64_t>(tokens),
                                         .tree = pointer<const fastspec::TreeNode>(tree),
                                         .positions = pointer<const int64_t>(positions),
                                         .sampling = sampling,
                                         .logit_type = static_cast<fastspec::LogitType>(logit_type),
                                         .path = pointer<int64_t>(path),
                                         .num_accepted = pointer<int64_t>(num_accepted),
                                         .next_token = pointer<int64_t>(next_token),
                                         .invalid = pointer<bool>(invalid),
                                         .target_stride = target_stride,
                                         .tokens_stride = tokens_stride,
                                         .batch_size = batch_size,
                                         .num_nodes = num_nodes,
                                         .num_inner = num_inner,
                                         .max_depth = max_depth,
                                         .vocab_size = vocab_size,
                                         .root_ahead = root_ahead,
                                         .root_inner_ahead = root_inner_ahead,
                                         .rule = static_cast<fastspec::Rule>(rule),
                                         .cluster_size = cluster_size,
                                         .clock = pointer<int64_t>(clock)};
  check(fastspec::verify(params, pointer<void>(stream)), "fastspec verify kernel");
}

void propose(std::uintptr_t logits, int logit_type, int64_t logits_stride, std::uintptr_t draft_logits,
             std::uintptr_t tokens, int64_t tokens_stride, std::uintptr_t tree, std::uintptr_t positions,
             const fastspec::SamplingParams& sampling, int batch_size, int num_nodes, int num_inner, int vocab_size,
             int draft_vocab_size, int first_inner, int num_rows, int level, int rule, int cluster_size,
             std::uintptr_t stream) {
  const fastspec::ProposeParams params = {.logits = pointer<const void>(logits),
                                          .draft_logits = pointer<float>(draft_logits),
                                          .tokens = pointer<int64_t>(tokens),
                                          .tree = pointer<const fastspec::TreeNode>(tree),
                                          .positions = pointer<const int64_t>(positions),
                                          .sampling = sampling,
                                          .logit_type = static_cast<fastspec::LogitType>(logit_type),
                                          .logits_stride = logits_stride,
                                          .tokens_stride = tokens_stride,
                                          .batch_size = batch_size,
                                          .num_nodes = num_nodes,
                                          .num_inner = num_inner,
                                          .vocab_size = vocab_size,
                                          .draft_vocab_size = draft_vocab_size,
                                          .first_inner = first_inner,
                                          .num_rows = num_rows,
                                          .level = level,
                                          .rule = static_cast<fastspec::Rule>(rule),
                                          .cluster_size = cluster_size};
  check(fastspec::propose(params, pointer<void>(stream)), "fastspec propose kernel");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of fastspec; see fastspec.ops for what they compute";
  py::class_<fastspec::SamplingParams>(m, "SamplingParams").def(py::init(&sampling_params));
  m.def("verify", &verify);
  m.def("propose", &propose);
  m.def("max_verify_group", &fastspec::max_verify_group);
  m.def("max_propose_group", &fastspec::max_propose_group);
  m.attr("architectures") = FASTSPEC_ARCHITECTURES;
  m.attr("cuda_version") = CUDART_VERSION;
}
