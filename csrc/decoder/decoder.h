// The decoder: a model's weights (shared), and sessions that run sequences through them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "decoder/adapter.h"
#include "decoder/config.h"
#include "decoder/forward.h"
#include "decoder/input_squares.h"
#include "decoder/kv_cache.h"
#include "decoder/low_rank.h"
#include "decoder/memory.h"
#include "decoder/profile.h"
#include "decoder/scratch.h"
#include "decoder/watch.h"
#include "decoder/weights.h"
#include "kernels/kernels.h"

namespace phi4edge {

// Read-only after construction, but for what its pool's run() serialises; any number of sessions may use it, from any threads.
class Model {
 public:
  // isa: see select_kernels().  Throws what load_weights() throws.
  Model(const gguf::File& file, int n_threads, const std::string& isa, const LoadProgress& progress);

  const ModelConfig& config() const { return config_; }
  const TensorLayout& layout() const { return layout_; }
  const Weights& weights() const { return weights_; }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }
  Scratch& scratch() { return scratch_; }  // within run() of the pool

 private:
  const KernelTable& kernels_;
  ModelConfig config_;
  TensorLayout layout_;
  ThreadPool pool_;
  Scratch scratch_;
  Weights weights_;
};

enum class LogitsFor { kNone, kLast, kAll };

// Rows of logits after an extension by n tokens.
inline int64_t logits_rows(LogitsFor which, int64_t n) {
  return which == LogitsFor::kNone ? 0 : which == LogitsFor::kLast ? std::min<int64_t>(n, 1) : n;
}

class Session;

// What one of several sessions appends; see Session::extend_together().
struct Extension {
  Session* session;
  const int32_t* tokens;
  int64_t n_tokens;
  int64_t first_logits = 0;  // set: the first of its rows
};

// One sequence: its inputs, and the KV cache of those that were computed.
//
// LongRoPE: the whole sequence uses the short factors while it has at most rope.original_context tokens, and the long
// factors beyond; when an extension (or a truncation) changes sides, everything cached is computed again.  So it is when the
// adapter or its scale changed: keys and values of two kinds never meet in one cache.
class Session {
 public:
  Session(std::shared_ptr<Model> model, int64_t n_context, KvType kv_type);

  // Appends inputs and computes them.  Logits, n_logits(n) rows of vocab_size floats, go to `logits`.
  // Throws InputError (a token out of range, more tokens than the context holds), CancelledError; then nothing has changed.
  void extend(const int32_t* tokens, int64_t n_tokens, LogitsFor which, float* logits, const ForwardProgress& progress);
  // The same with rows of hidden_size floats in place of token embeddings.
  void extend_embeddings(const float* rows, int64_t n_rows, LogitsFor which, float* logits, const ForwardProgress& progress);
  // As extend() of each of them with every weight read once for all, and with the same logits to the bit.  Logits of one
  // session lie together, from row `first_logits` on.  cancel() of any of them ends it, and when it throws none of them has
  // changed. Throws InputError also for a session that is there twice, or of another model.
  static void extend_together(std::span<Extension> extensions, LogitsFor which, float* logits, const ForwardProgress& progress);
  // Appends inputs that the next extension will compute together with its own.  Throws what extend() throws for them.
  void append(const int32_t* tokens, int64_t n_tokens);
  void append_embeddings(const float* rows, int64_t n_rows);

  void truncate(int64_t n_tokens);
  // Room for n_context tokens from now on; what was computed stays.  Throws InputError when that is less than there is now, or
  // more than any model has, and OutOfMemoryError; then nothing has changed.
  void grow(int64_t n_context);
  // How many of the cached tokens an extension to n_tokens in all will use: none when LongRoPE changes sides, or the adapter
  // is another one.
  int64_t n_reusable(int64_t n_tokens) const { return regime_of(n_tokens) == cached_as_ ? n_cached_ : 0; }
  // From the next extension on, for the whole sequence.  nullptr: none.  Throws InputError (an adapter of another model, a
  // scale that is not finite or too large, a call while another one runs).
  void set_adapter(std::shared_ptr<const Adapter> adapter, double scale);
  void cancel() { cancelled_.store(true); }  // from any thread; ends the extend() that is running

  // Starts sums of squares of every matrix's inputs at zero, or stops adding to them.  Only the tokens of
  // extend() count, once even if they are computed again; a call that was cancelled has added a part of its tokens.
  void collect_input_squares(bool enabled);
  std::vector<InputSquares::Entry> input_squares();  // empty before the first collect_input_squares(true)

  // Starts to measure where the time of forward passes goes, from zero, or stops and forgets.  A pass of several sessions
  // counts for one of them.
  void collect_profile(bool enabled);
  std::vector<OperationTotal> profile();  // in the order of kOperationNames; empty while it is off

  int64_t n_tokens() const { return int64_t(inputs_.size()); }
  int64_t n_context() const { return n_context_; }
  size_t kv_bytes() const { return cache_.n_bytes(); }
  const ModelConfig& config() const { return model_->config(); }

 private:
  // What keys and values depend on, beside the inputs.
  struct Regime {
    bool long_factors = false;
    uint64_t adapter = 0;  // its id; 0 is none
    double scale = 0.0;
    bool operator==(const Regime&) const = default;
  };

  Regime regime_of(int64_t n_tokens) const {
    const int64_t original = config().rope.original_context;
    return {original > 0 && n_tokens > original, adapter_ ? adapter_->id() : 0, adapter_scale_};
  }
  std::pair<uint64_t, double> adapter_order() const { return {adapter_ ? adapter_->id() : 0, adapter_scale_}; }
  void check_room(int64_t n_new) const;
  void push(const int32_t* tokens, int64_t n_tokens);
  void push_rows(const float* rows, int64_t n_rows);
  void drop_inputs(int64_t n_kept);
  Slice next_slice(int64_t n_before, int64_t n_most, LogitsFor which);

  // A session to which inputs were pushed after the n_before that it had.
  struct Part {
    Session* session;
    int64_t n_before;
  };
  static void compute(std::span<const Part> parts, LogitsFor which, float* logits, const ForwardProgress& progress);
  static void drop_new(std::span<const Part> parts);

  std::shared_ptr<Model> model_;
  int64_t n_context_;
  KvCache cache_;
  std::vector<Input> inputs_;
  std::vector<float> embedding_rows_;  // of the inputs that are not tokens, in order
  int64_t n_cached_ = 0;               // leading inputs whose keys and values are valid
  Regime cached_as_;                   // how those were computed
  std::shared_ptr<const Adapter> adapter_;
  double adapter_scale_ = 0.0;
  LowRank low_rank_;  // that the adapter fits

  std::unique_ptr<InputSquares> squares_;
  bool wants_squares_ = false;

  std::unique_ptr<Profile> profile_;  // null: off

  std::atomic<bool> in_use_{false};
  std::atomic<bool> cancelled_{false};
};

// What the weights of a file and one session take.  Throws InputError for a context that no model has.
MemoryNeed memory_need(const gguf::File& file, const ModelConfig& config, int64_t n_context, KvType kv_type);

}  // namespace phi4edge
