// The Python module fastspec._C: pointers, sizes and a stream in, an exception on failure.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
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
            int max_depth, int vocab_size, int root_ahead, int root_inner_ahead, const std::string& inner_nodes,
            int rule, int group_size, std::uintptr_t mail, int mail_rows, std::uintptr_t clock, std::uintptr_t stream) {
  fastspec::VerifyParams params = {.target_logits = pointer<const void>(target_logits),
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
                                   .group_size = group_size,
                                   .slicing = fastspec::Slicing(vocab_size),
                                   .mail = pointer<void>(mail),
                                   .mail_size = fastspec::verify_mail_size(mail_rows, vocab_size),
                                   .mail_rows = mail_rows,
                                   .clock = pointer<int64_t>(clock)};
  params.has_inner_nodes =
      inner_nodes.size() == static_cast<std::size_t>(num_inner) && num_inner <= fastspec::kMaxInner;
  if (params.has_inner_nodes) std::copy(inner_nodes.begin(), inner_nodes.end(), params.inner_nodes);
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

void commit(std::uintptr_t path, std::uintptr_t num_accepted, std::uintptr_t next_token, std::uintptr_t invalid,
            std::uintptr_t eos_token_ids, std::uintptr_t max_tokens, std::uintptr_t tokens, std::uintptr_t num_tokens,
            std::uintptr_t reason, std::uintptr_t num_new, std::uintptr_t num_drafted, std::uintptr_t tree_tokens,
            std::uintptr_t new_tokens, std::uintptr_t report, std::uintptr_t cycles, std::uintptr_t accepted,
            std::uintptr_t committed, std::uintptr_t seen, int64_t tokens_stride, int batch_size, int num_nodes,
            int path_length, int vocab_size, int running, int ended, int full, int failed, bool first,
            std::uintptr_t stream) {
  const fastspec::CommitParams params = {.path = pointer<const int64_t>(path),
                                         .num_accepted = pointer<const int64_t>(num_accepted),
                                         .next_token = pointer<const int64_t>(next_token),
                                         .invalid = pointer<const bool>(invalid),
                                         .eos_token_ids = pointer<const int64_t>(eos_token_ids),
                                         .max_tokens = pointer<const int64_t>(max_tokens),
                                         .tokens = pointer<int64_t>(tokens),
                                         .num_tokens = pointer<int64_t>(num_tokens),
                                         .reason = pointer<int64_t>(reason),
                                         .num_new = pointer<int64_t>(num_new),
                                         .num_drafted = pointer<int64_t>(num_drafted),
                                         .tree_tokens = pointer<int64_t>(tree_tokens),
                                         .new_tokens = pointer<int64_t>(new_tokens),
                                         .report = pointer<int64_t>(report),
                                         .cycles = pointer<int64_t>(cycles),
                                         .accepted = pointer<int64_t>(accepted),
                                         .committed = pointer<int64_t>(committed),
                                         .seen = pointer<bool>(seen),
                                         .tokens_stride = tokens_stride,
                                         .batch_size = batch_size,
                                         .num_nodes = num_nodes,
                                         .path_length = path_length,
                                         .vocab_size = vocab_size,
                                         .running = running,
                                         .ended = ended,
                                         .full = full,
                                         .failed = failed,
                                         .first = first};
  check(fastspec::commit(params, pointer<void>(stream)), "fastspec commit kernel");
}

void compact(std::uintptr_t keys, std::uintptr_t values, std::uintptr_t num_tokens, std::uintptr_t path,
             std::uintptr_t num_accepted, int64_t capacity, int num_layers, int batch_size, int num_heads,
             int row_bytes, int path_length, std::uintptr_t stream) {
  const fastspec::CompactParams params = {.keys = pointer<void>(keys),
                                          .values = pointer<void>(values),
                                          .num_tokens = pointer<const int64_t>(num_tokens),
                                          .path = pointer<const int64_t>(path),
                                          .num_accepted = pointer<const int64_t>(num_accepted),
                                          .capacity = capacity,
                                          .num_layers = num_layers,
                                          .batch_size = batch_size,
                                          .num_heads = num_heads,
                                          .row_bytes = row_bytes,
                                          .path_length = path_length};
  check(fastspec::compact(params, pointer<void>(stream)), "fastspec compact kernel");
}

fastspec::PassParams pass_params(std::uintptr_t layers, std::uintptr_t embedding, std::uintptr_t final_norm,
                                 std::uintptr_t lm_head, std::uintptr_t rotation, std::uintptr_t keys,
                                 std::uintptr_t values, std::uintptr_t num_visible, std::uintptr_t visible,
                                 std::uintptr_t key_map, std::uintptr_t value_map, std::uintptr_t parts,
                                 std::uintptr_t counters, int type, int batch_size, int num_rows, int first_slot,
                                 int num_slots, int max_visible, int num_layers, int hidden_size, int num_heads,
                                 int num_kv_heads, int head_dim, int ffn_size, int vocab_size, int embedding_rows,
                                 int capacity, int num_splits, int residual_tile, int num_blocks, int under_way,
                                 float epsilon, float scale) {
  return {.layers = pointer<const fastspec::PassLayer>(layers),
          .embedding = pointer<const void>(embedding),
          .final_norm = pointer<const void>(final_norm),
          .lm_head = pointer<const void>(lm_head),
          .rotation = pointer<const float>(rotation),
          .keys = pointer<void>(keys),
          .values = pointer<void>(values),
          .num_visible = pointer<const int>(num_visible),
          .visible = pointer<const uint8_t>(visible),
          .key_map = pointer<const void>(key_map),
          .value_map = pointer<const void>(value_map),
          .exchange = nullptr,
          .parts = pointer<void>(parts),
          .counters = pointer<uint32_t>(counters),
          .type = static_cast<fastspec::LogitType>(type),
          .batch_size = batch_size,
          .num_rows = num_rows,
          .first_slot = first_slot,
          .num_slots = num_slots,
          .max_visible = max_visible,
          .num_layers = num_layers,
          .hidden_size = hidden_size,
          .num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .ffn_size = ffn_size,
          .vocab_size = vocab_size,
          .embedding_rows = embedding_rows,
          .capacity = capacity,
          .num_splits = num_splits,
          .residual_tile = residual_tile,
          .num_blocks = num_blocks,
          .under_way = under_way,
          .epsilon = epsilon,
          .scale = scale};
}

py::bytes encode_matrix(std::uintptr_t matrix, int64_t rows, int64_t depth, bool is_cache) {
  alignas(64) char map[fastspec::kTensorMapBytes];
  check(fastspec::encode_matrix(pointer<const void>(matrix), rows, depth, is_cache, map), "fastspec matrix map");
  return py::bytes(map, sizeof(map));
}

void run_pass(const fastspec::PassParams& params, std::uintptr_t token_ids, std::uintptr_t prefix,
              std::uintptr_t logit_row, std::uintptr_t logits, std::uintptr_t clock, std::uintptr_t stream) {
  const fastspec::PassCall call = {.token_ids = pointer<const int64_t>(token_ids),
                                   .prefix = pointer<const int64_t>(prefix),
                                   .logit_row = pointer<const int64_t>(logit_row),
                                   .logits = pointer<float>(logits),
                                   .clock = pointer<int64_t>(clock)};
  check(fastspec::run_pass(params, call, pointer<void>(stream)), "fastspec pass kernel");
}

// Cycles that the device repeats by itself; see fastspec.runtime.loop.
class Loop {
 public:
  Loop(std::uintptr_t cycle, std::uintptr_t report, std::uintptr_t reason, std::uintptr_t turn, std::uintptr_t ring,
       std::uintptr_t published, std::uintptr_t control, int batch_size, int width, int running, int stopped) {
    const fastspec::LoopParams params = {.report = pointer<const int64_t>(report),
                                         .reason = pointer<int64_t>(reason),
                                         .turn = pointer<int64_t>(turn),
                                         .ring = pointer<int64_t>(ring),
                                         .published = pointer<int64_t>(published),
                                         .control = pointer<int64_t>(control),
                                         .batch_size = batch_size,
                                         .width = width,
                                         .running = running,
                                         .stopped = stopped};
    check(fastspec::make_loop(params, pointer<void>(cycle), &loop_), "fastspec loop");
  }
  Loop(const Loop&) = delete;
  ~Loop() { fastspec::destroy_loop(&loop_); }

  void launch(std::uintptr_t stream) const {
    check(fastspec::launch_loop(loop_, pointer<void>(stream)), "fastspec loop launch");
  }

 private:
  fastspec::LoopGraph loop_;
};

// A number that the device writes; what it wrote before that is visible to who has read it.
int64_t load(std::uintptr_t address) {
  return std::atomic_ref<int64_t>(*pointer<int64_t>(address)).load(std::memory_order_acquire);
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of fastspec; see fastspec.ops for what they compute";
  py::class_<fastspec::SamplingParams>(m, "SamplingParams").def(py::init(&sampling_params));
  py::class_<fastspec::PassParams>(m, "PassParams")
      .def(py::init(&pass_params))
      .def("set_exchange",
           [](fastspec::PassParams& params, std::uintptr_t exchange) { params.exchange = pointer<void>(exchange); });
  m.def("verify", &verify);
  m.def("propose", &propose);
  m.def("encode_matrix", &encode_matrix);
  m.def("run_pass", &run_pass);
  m.def("pass_slots", &fastspec::pass_slots);
  m.def("pass_exchange_bytes", &fastspec::pass_exchange_bytes);
  m.def("commit", &commit);
  m.def("compact", &compact);
  py::class_<Loop>(m, "Loop")
      .def(py::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                    std::uintptr_t, int, int, int, int>())
      .def("launch", &Loop::launch);
  m.def("load", &load);
  m.def("driver_version", &driver_version);
  m.def("verify_mail_size", &fastspec::verify_mail_size);
  m.def("verify_group_size", &fastspec::verify_group_size);
  m.def("max_propose_group", &fastspec::max_propose_group);
  m.attr("architectures") = FASTSPEC_ARCHITECTURES;
  m.attr("cuda_version") = CUDART_VERSION;
}
