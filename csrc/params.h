// What the host hands to the kernels: raw pointers and sizes, no framework types.
#pragma once

#include <cstdint>

namespace fastspec {

constexpr int kMaxNodes = 128;
constexpr int kMaxEos = 16;

// Element types of logits.
enum class LogitType : int { kFloat = 0, kBfloat16 = 1, kHalf = 2 };

// Acceptance rules; the kernels know all of fastspec.verification.Rule but traversal over trees.
enum class Rule : int {
  kTokenLevel = 0,
  kBlock = 1,
  kRecursiveRejection = 2,
  kTargetOnly = 3,
  kDrafterInvariant = 4,
};

// Where a verification stands when it notes the clock.
enum class Mark : int { kStart = 0, kRead = 1, kStatistics = 2, kWalk = 3, kEnd = 4 };
constexpr int kNumMarks = 5;

// Per-sequence sampling parameters, [B] each unless said.
struct SamplingParams {
  const double* temperature;
  const int64_t* top_k;
  const double* top_p;
  const double* min_p;
  const double* repetition_penalty;
  const int64_t* min_tokens;
  const int64_t* seed;
  const int64_t* eos_token_ids;  // [B, kMaxEos], padded with -1
  const uint8_t* seen;           // [B, V]
};

// The draft tree in breadth-first order, one row of a table per node.
struct TreeNode {
  int parent, depth, first_child, num_children;
  int inner_row;   // row of the draft's distributions; -1 for a leaf
  int inner_node;  // entry i: the node whose row of the draft's distributions is i
  // Descendants whose rows are read along with this node's own: `num_ahead` nodes from first_child on, and the
  // `num_inner_ahead` rows of the draft's distributions from `first_inner_ahead` on.
  int first_inner_ahead;
  int16_t num_ahead, num_inner_ahead;
};

constexpr int kMaxRowsAtOnce = 16;  // rows of logits that are read together: target and draft
constexpr int kMaxVocab = 1 << 18;

struct VerifyParams {
  const void* target_logits;  // [B, N, target_stride]
  const float* draft_logits;  // [B, N_inner, V], log-weights of q; null where the rule needs none
  const int64_t* tokens;      // [B, tokens_stride]
  const TreeNode* tree;       // [N]
  const int64_t* positions;   // [B], position of the root's successor
  SamplingParams sampling;
  LogitType logit_type;
  int64_t* path;          // [B, D + 1]
  int64_t* num_accepted;  // [B]
  int64_t* next_token;    // [B]
  bool* invalid;          // [B]
  int64_t target_stride, tokens_stride;
  int batch_size, num_nodes, num_inner, max_depth, vocab_size;
  int root_ahead, root_inner_ahead;  // num_ahead and num_inner_ahead of the root, known before the tree is read
  Rule rule;
  int cluster_size;
  int64_t* clock;  // [kNumMarks] cycles at each Mark, for measuring; may be null
};

struct ProposeParams {
  const void* logits;        // [B, R, logits_stride] raw draft logits
  float* draft_logits;       // [B, N_inner, V], the rows of the level are written
  int64_t* tokens;           // [B, tokens_stride], the children of the level are written
  const TreeNode* tree;      // [N]
  const int64_t* positions;  // [B]
  SamplingParams sampling;
  LogitType logit_type;
  int64_t logits_stride, tokens_stride;
  int batch_size, num_nodes, num_inner, vocab_size, draft_vocab_size;
  int first_inner, num_rows, level;  // the level's rows among the inner nodes
  Rule rule;
  int cluster_size;
};

// Each launches one kernel on the stream and returns a CUDA error code.
int verify(const VerifyParams& params, void* stream);
int propose(const ProposeParams& params, void* stream);

// The most blocks that can work on one sequence (or row) together on the current device; 1 before sm_90.
int max_verify_group();
int max_propose_group();

}  // namespace fastspec
