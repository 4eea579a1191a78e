// Where the time of forward passes goes, by operation: how long the threads were at it, and how much it had to do.
#pragma once

#include <chrono>
#include <cstdint>
#include <iterator>
#include <vector>

#include "base/aligned.h"
#include "decoder/config.h"
#include "decoder/panels.h"

namespace phi4edge {

class Adapter;
struct Weights;

enum class Operation : int {
  kStart,  // angles of the positions, and until the threads are awake
  kEmbed,
  kNorm,
  kQkv,
  kRopeAndStore,
  kAttention,
  kAttentionOutput,
  kGateUp,
  kSilu,
  kDown,
  kHead,
  kAdapterA,
  kAdapterB,
  kWait,  // for the other threads
};
// A step that leaves its result quantised for the next one has that in its time.
inline constexpr const char* kOperationNames[] = {
    "start",   "embed", "norm", "qkv",  "rope, kv store", "attention", "attention output",
    "gate up", "silu",  "down", "head", "adapter A",      "adapter B", "wait"};
inline constexpr int kOperationCount = int(std::size(kOperationNames));
static_assert(int(Operation::kWait) + 1 == kOperationCount);

Operation operation_of(Product product);

struct OperationTotal {
  const char* name;
  double seconds;       // mean of the threads; those of all operations add up to the time of the passes
  uint64_t n_bytes;     // of weights, or of keys and values, that a pass cannot do without reading
  uint64_t operations;  // of matrix products, where multiplying and adding are two
};

// Stamps of all threads.  Between begin_pass() and end_pass(), every moment of each thread belongs to one operation: to the
// one it says it has done at the end of it.
class Profile {
 public:
  explicit Profile(int n_threads) : threads_(size_t(n_threads)) {}

  void begin_pass();
  void end_pass();  // all threads have returned
  void done(int thread, Operation operation) {
    ThreadTimes& times = threads_[size_t(thread)];
    const auto now = Clock::now();
    times.spent[int(operation)] += now - times.last;
    times.last = now;
  }

  // What a pass of n_tokens has to do that gives n_logits rows of logits, and an adapter of n_tokens.
  void add_weights(const Weights& weights, int64_t n_tokens, int64_t n_logits);
  void add_adapter(const Adapter& adapter, int64_t n_layers, int64_t n_tokens);
  void add_bytes(Operation operation, uint64_t n_bytes) { work_[int(operation)].n_bytes += n_bytes; }

  std::vector<OperationTotal> totals() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct alignas(kCacheLine) ThreadTimes {
    Clock::time_point last;
    Clock::duration spent[kOperationCount] = {};
  };
  struct Work {
    uint64_t n_bytes = 0, operations = 0;
  };

  void add_product(Operation operation, const PanelMatrix& matrix, int64_t n_tokens);

  std::vector<ThreadTimes> threads_;
  Work work_[kOperationCount];
};

}  // namespace phi4edge
