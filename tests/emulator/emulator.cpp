// Fibers, warps and blocks of a launch; see cuda_runtime.h.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#include "cuda_runtime.h"
#include "params.h"

thread_local dim3 threadIdx, blockIdx, gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kRounds = 4;         // of all lanes of a block, before another block has its turn
constexpr long kPatience = 200000;  // turns of all blocks, after which a launch is given up

const char* const kNames[] = {"__shfl_sync",   "__shfl_xor_sync",   "__shfl_up_sync",    "__shfl_down_sync",
                              "__ballot_sync", "__reduce_max_sync", "__reduce_min_sync", "__syncwarp"};

struct Warp {
  uint64_t values[32], gathered[32];
  uint32_t arrived = 0;
  uint64_t generation = 0;
  Operation operation = kSync;
};

struct Fiber {
  jmp_buf context;
  ucontext_t start;
  bool started = false, done = false;
};

// The same numbers in every run.
struct Random {
  uint32_t state;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 16; }
};

struct Launch {
  const std::function<void()>& kernel;
  std::string failure;  // what went wrong; all leave then
};

class Block;
thread_local Block* current_block;
alignas(16) thread_local unsigned char shared_memory[kSharedBytes];

// One block, by a thread that runs when it has its turn: shared memory is local to the thread.
class Block {
 public:
  Block(Launch& launch, dim3 grid, dim3 index, unsigned threads)
      : launch_(launch),
        grid_(grid),
        index_(index),
        num_threads_(static_cast<int>(threads)),
        live_(num_threads_),
        fibers_(threads),
        warps_((threads + 31) / 32),
        random_{12345 + 7919 * index.x + index.y} {
    stacks_ = static_cast<char*>(mmap(nullptr, kStackBytes * threads, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) std::abort();
    thread_ = std::thread([this] { run(); });
  }
  ~Block() {
    thread_.join();
    munmap(stacks_, kStackBytes * static_cast<size_t>(num_threads_));
  }

  // By the launch: lets the block go on for a while.
  void turn() {
    go_.release();
    gone_.acquire();
  }
  bool is_over() const { return over_; }
  std::string where() const {
    return "block " + std::to_string(index_.x) + ", " + std::to_string(index_.y) + ": " + std::to_string(live_) +
           " threads, " + std::to_string(met_) + " of them at a barrier";
  }

  // By the lane that runs.
  void yield() {
    if (_setjmp(fibers_[current_].context) == 0) _longjmp(scheduler_, 1);
  }
  const uint64_t* gather(Operation operation, uint64_t value) {
    Warp& warp = warps_[current_ / 32];
    if (warp.arrived == 0) warp.operation = operation;
    if (warp.operation != operation) {
      fail("thread " + std::to_string(current_) + " is at " + kNames[operation] + ", its warp at " +
           kNames[warp.operation]);
    }
    warp.values[current_ % 32] = value;
    warp.arrived |= 1u << current_ % 32;
    const uint64_t generation = warp.generation;
    if (warp.arrived == 0xffffffffu) {
      std::copy(warp.values, warp.values + 32, warp.gathered);
      warp.arrived = 0, ++warp.generation;
    } else {
      while (warp.generation == generation) yield();
    }
    return warp.gathered;
  }
  int meet(int value) {
    any_ |= value;
    const uint64_t generation = generation_;
    ++met_;
    open_barrier();
    while (generation_ == generation) yield();
    return result_;
  }

 private:
  // If all threads are there; those that have ended count, too.
  void open_barrier() {
    if (met_ == live_) result_ = any_, any_ = 0, met_ = 0, ++generation_;
  }

  void fail(const std::string& what) {
    if (launch_.failure.empty()) launch_.failure = where() + ": " + what;
    for (;;) yield();
  }

  void run() {
    current_block = this;
    blockIdx = index_, gridDim = grid_;
    std::memset(shared_memory, 0xff, kSharedBytes);
    for (;;) {
      go_.acquire();
      for (int round = 0; round < kRounds && live_ > 0 && launch_.failure.empty(); ++round) run_round();
      over_ = live_ == 0 || !launch_.failure.empty();
      gone_.release();
      if (over_) return;
    }
  }

  // All warps, or but some of them: what depends on the order of warps comes to light.
  void run_round() {
    const uint32_t left_behind = random_.next() & random_.next();
    const int num_warps = static_cast<int>(warps_.size()), first = static_cast<int>(random_.next()) % num_warps;
    for (int i = 0; i < num_warps; ++i) {
      const int warp = (first + i) % num_warps;
      if (left_behind >> warp % 16 & 1) continue;
      for (int thread = 32 * warp; thread < std::min(32 * warp + 32, num_threads_); ++thread) {
        if (!fibers_[thread].done) run_fiber(thread);
      }
    }
  }

  void run_fiber(int thread) {
    current_ = thread, threadIdx.x = static_cast<unsigned>(thread);
    Fiber& fiber = fibers_[thread];
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks_ + kStackBytes * static_cast<size_t>(thread);
    fiber.start.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
  }

  static void enter() {
    Block& block = *current_block;
    block.launch_.kernel();
    block.fibers_[block.current_].done = true;
    --block.live_;
    block.open_barrier();
    _longjmp(block.scheduler_, 1);
  }

  Launch& launch_;
  const dim3 grid_, index_;
  const int num_threads_;
  int live_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Random random_;
  char* stacks_;
  jmp_buf scheduler_;
  int current_ = 0;
  int met_ = 0, any_ = 0, result_ = 0;
  uint64_t generation_ = 0;
  bool over_ = false;
  std::binary_semaphore go_{0}, gone_{0};
  std::thread thread_;
};

}  // namespace

void yield() { current_block->yield(); }
const uint64_t* gather(Operation operation, uint64_t value) { return current_block->gather(operation, value); }
int meet(int value) { return current_block->meet(value); }
unsigned char* dynamic_shared() { return shared_memory; }

int launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  Launch launch = {kernel, ""};
  std::vector<std::unique_ptr<Block>> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(std::make_unique<Block>(launch, grid, dim3(x, y), threads));
  }
  Random random = {1};
  for (long turns = 0; !blocks.empty(); ++turns) {
    if (turns == kPatience && launch.failure.empty()) launch.failure = blocks.front()->where() + ": hangs";
    const size_t first = random.next() % blocks.size();
    std::rotate(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>(first), blocks.end());
    for (const auto& block : blocks) block->turn();
    std::erase_if(blocks, [](const auto& block) { return block->is_over(); });
  }
  if (launch.failure.empty()) return cudaSuccess;
  std::fprintf(stderr, "%s\n", launch.failure.c_str());
  return cudaErrorLaunchTimeout;
}

}  // namespace emulator

// What the module binds and is not emulated.
namespace fastspec {

int commit(const CommitParams&, void*) { return cudaErrorNotSupported; }
int compact(const CompactParams&, void*) { return cudaErrorNotSupported; }
int run_pass(const PassParams&, const PassCall&, void*) { return cudaErrorNotSupported; }
int64_t pass_exchange_bytes(const PassParams&) { return 0; }
int pass_slots(const PassParams&) { return 0; }
int encode_matrix(const void*, int64_t, int64_t, bool, void*) { return cudaErrorNotSupported; }
int make_loop(const LoopParams&, void*, LoopGraph*) { return cudaErrorNotSupported; }
int launch_loop(const LoopGraph&, void*) { return cudaErrorNotSupported; }
void destroy_loop(LoopGraph*) {}

}  // namespace fastspec
