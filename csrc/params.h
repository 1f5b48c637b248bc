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
struct alignas(16) TreeNode {
  int parent, depth, first_child, num_children;
  int inner_row;   // row of the draft's distributions; -1 for a leaf
  int inner_node;  // entry i: the node whose row of the draft's distributions is i
  // Descendants whose rows are read along with this node's own: `num_ahead` nodes from first_child on, and the
  // `num_inner_ahead` rows of the draft's distributions from `first_inner_ahead` on.
  int first_inner_ahead;
  int16_t num_ahead, num_inner_ahead;
};

constexpr int kMaxSlices = 128;     // parts of the vocabulary that blocks share
constexpr int kMaxVocab = 1 << 18;
constexpr int kTile = 512;  // tokens that a warp reads at once
constexpr int kMaxInner = 16;  // inner nodes of a small tree

// How the vocabulary is dealt out: tiles of 512 tokens, and slices of as many tiles as make at most kMaxSlices.
struct Slicing {
  int num_tiles, tiles_per_slice, num_slices;
  explicit Slicing(int vocab_size);
};

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
  int group_size;  // blocks per sequence
  Slicing slicing;
  // Whether the tree is verified as a small one, greedily and where laws cut nothing; the launch sets both.
  bool is_small = false, is_small_rejection = false;
  int max_local = 0;  // slices of a block at most; the launch sets it
  uint8_t inner_nodes[kMaxInner] = {};  // entry i: the node whose row of the draft's distributions is i;
  bool has_inner_nodes = false;  // if there is room for all of them, and a lane for each of their children
  bool draws_last = false;  // whether the draw after the last node is made with the first read; the launch sets it
  void* mail;         // [B, mail_size] messages, zeros before the first launch; launches must not overlap
  int64_t mail_size;  // verify_mail_size() of mail_rows
  int mail_rows;      // about which there is room for messages at a time
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

constexpr int kReportTokens = 3;  // count, drafted and reason come before the tokens

// What a verdict changes; [B] int64 each unless said. See fastspec.state.DecodeState.
struct CommitParams {
  const int64_t* path;  // [B, path_length]
  const int64_t* num_accepted;
  const int64_t* next_token;
  const bool* invalid;
  const int64_t* eos_token_ids;  // [B, kMaxEos], padded with -1
  const int64_t* max_tokens;
  int64_t* tokens;  // [B, tokens_stride]
  int64_t* num_tokens;
  int64_t* reason;
  int64_t* num_new;
  int64_t* num_drafted;
  int64_t* tree_tokens;  // [B, num_nodes]
  int64_t* new_tokens;   // [B, path_length]
  int64_t* report;       // [B, kReportTokens + path_length]
  int64_t* cycles;
  int64_t* accepted;  // [B, path_length]
  int64_t* committed;
  bool* seen;  // [B, vocab_size]
  int64_t tokens_stride;
  int batch_size, num_nodes, path_length, vocab_size;
  int running, ended, full, failed;  // numbers of fastspec.state.FinishReason
  bool first;                        // the verdict is on the prefill's logits, which are not a cycle
};

// A static cache [layers, B, heads, capacity, row_bytes] whose accepted rows move together.
struct CompactParams {
  void* keys;
  void* values;
  const int64_t* num_tokens;  // [B], committed tokens; the cache holds one row fewer
  const int64_t* path;        // [B, path_length]
  const int64_t* num_accepted;
  int64_t capacity;
  int num_layers, batch_size, num_heads, row_bytes, path_length;
};

// What the kernel after each cycle of a loop reads and writes (loop.cu). The last three are pinned memory of the host.
struct LoopParams {
  const int64_t* report;  // [B, width], of the cycle that has just ended
  int64_t* reason;        // [B]
  int64_t* turn;          // cycles since the launch
  int64_t* ring;          // [most cycles ever, B, width], the report of each cycle
  int64_t* published;     // how many of them are there
  int64_t* control;       // [1 + B], read after each cycle: most cycles; for each sequence, whether it shall end
  int batch_size, width;
  int running, stopped;  // numbers of fastspec.state.FinishReason
};

// A graph with a loop in it, and the same ready to launch: cudaGraph_t and cudaGraphExec_t.
struct LoopGraph {
  void *graph, *executable;
};

constexpr int kMaxPassRows = 128;
constexpr int kMaxPassBatch = 8;
constexpr int kMaxVisible = 17;  // rows of a pass that one of them sees, itself included
constexpr int kMaxSplits = 8;    // blocks that share the keys of one head
constexpr int kNearParts = 4;    // parts of the keys that are not split so
constexpr int kMinSlots = 4;     // of the ring
constexpr int kExchanges = 3;    // buffers through which the blocks of a pass hand over activations

// Weights of one decoder layer: vectors, of which qkv_bias may be null, and tensor maps (encode_matrix) of matrices
// [out, in].
struct PassLayer {
  const void *input_norm, *qkv, *qkv_bias, *output, *post_norm, *gate_up, *down;
};
constexpr int kTensorMapBytes = 128;

// One pass of a transformer over R rows of each of B sequences (pass.cuh). "Rows" below are the B R rows of all.
struct PassParams {
  const PassLayer* layers;  // [num_layers], on the device
  const void* embedding;    // [embedding_rows, hidden_size]
  const void* final_norm;   // [hidden_size]
  const void* lm_head;      // tensor map of [vocab_size, hidden_size]
  const float* rotation;    // [capacity, head_dim / 2, 2], cosine and sine of each position
  void *keys, *values;      // [num_layers, B, num_kv_heads, capacity, head_dim]
  const int* num_visible;   // [R], rows after the prefix that each row sees
  const uint8_t* visible;   // [R, kMaxVisible], which ones, in order of position
  const void *key_map, *value_map;  // tensor maps of the same, as matrices of head_dim columns
  // Work space. Launches that share it must not overlap.
  void* exchange;  // [kExchanges, pass_exchange_bytes()], all bits set before the first launch; see exchange.cuh
  // Outputs of the parts of attention, for each tile of 16 pairs of a row and a query head of each head of the cache:
  // [tiles, num_splits + kNearParts, 16, head_dim / 2] messages, zeros before the first launch.
  void* parts;
  uint32_t* counters;  // [4], zeros before the first launch: arrivals, departures, launches in 64 bits
  LogitType type;  // of weights, cache and activations
  int batch_size, num_rows, first_slot;
  int num_slots;  // scratch rows after the prefix that may be read or written
  int max_visible;  // largest of num_visible
  int num_layers, hidden_size, num_heads, num_kv_heads, head_dim, ffn_size, vocab_size, embedding_rows, capacity;
  int num_splits;
  int residual_tile;  // rows of the matrices that write the residual stream which go together, 8 or 16
  int num_blocks;  // one per multiprocessor
  int under_way;  // slots of the ring that may be on their way from memory at a time
  float epsilon;
  float scale;  // of attention scores
};

struct PassCall {
  const int64_t* token_ids;  // [B, R]
  const int64_t* prefix;  // [B]
  const int64_t* logit_row;  // [B], the row of each sequence whose logits are wanted; null: all
  float* logits;  // [B, R or 1, vocab_size]
  int64_t* clock;  // [5 num_layers + 3] ns when block 0 starts, begins each step, and ends, for measuring; may be null
};

// Describes a row-major matrix of 16-bit elements to the bulk copies of a pass, in kTensorMapBytes that go to device
// memory, aligned to 64 bytes; depth must be a multiple of 64. Weights come in boxes of 8 rows, the cache in boxes of
// 16. Returns a CUDA error code.
int encode_matrix(const void* matrix, int64_t rows, int64_t depth, bool is_cache, void* map);

// Each launches one kernel on the stream and returns a CUDA error code.
int verify(const VerifyParams& params, void* stream);
int propose(const ProposeParams& params, void* stream);
int run_pass(const PassParams& params, const PassCall& call, void* stream);
int commit(const CommitParams& params, void* stream);
int compact(const CompactParams& params, void* stream);

// A graph that repeats the cycle, a cudaGraph_t which is copied, until all sequences have ended or the host wants no
// more; for CUDA 12.4 and later. Return CUDA error codes; after a failure there is nothing to destroy.
int make_loop(const LoopParams& params, void* cycle, LoopGraph* loop);
int launch_loop(const LoopGraph& loop, void* stream);
void destroy_loop(LoopGraph* loop);

// How many messages of 16 bytes the blocks of a group may have under way, about so many rows at a time.
int64_t verify_mail_size(int num_rows, int vocab_size);
// Blocks per sequence with which a verification is fastest on the current device.
int verify_group_size(int batch_size, int vocab_size);
// The most blocks that can propose from one row together on the current device; 1 before sm_90.
int max_propose_group();

// Slots of the ring through which a pass would stream weights on the current device; it needs at least kMinSlots.
int pass_slots(const PassParams& params);
// Bytes of one of its exchange buffers.
int64_t pass_exchange_bytes(const PassParams& params);

}  // namespace fastspec
