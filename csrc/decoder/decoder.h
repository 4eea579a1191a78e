// The decoder: a model's weights (shared), and sessions that run sequences through them.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "decoder/adapter.h"
#include "decoder/config.h"
#include "decoder/input_squares.h"
#include "decoder/kv_cache.h"
#include "decoder/low_rank.h"
#include "decoder/memory.h"
#include "decoder/ops.h"
#include "decoder/profile.h"
#include "decoder/weights.h"
#include "kernels/kernels.h"

namespace phi4edge {

// Read-only after construction; any number of sessions may use it, from any threads.
class Model {
 public:
  // isa: see select_kernels().  Throws what load_weights() throws.
  Model(const gguf::File& file, int n_threads, const std::string& isa, const LoadProgress& progress);

  const ModelConfig& config() const { return config_; }
  const TensorLayout& layout() const { return layout_; }
  const Weights& weights() const { return weights_; }
  const KernelTable& kernels() const { return kernels_; }
  ThreadPool& pool() { return pool_; }

 private:
  const KernelTable& kernels_;
  ModelConfig config_;
  TensorLayout layout_;
  ThreadPool pool_;
  Weights weights_;
};

enum class LogitsFor { kNone, kLast, kAll };

// Tokens done, tokens to do in this call; returns false to cancel.  Called on the caller's thread.
using ForwardProgress = std::function<bool(int64_t done, int64_t total)>;

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

  // Starts to measure where the time of forward passes goes, from zero, or stops and forgets.
  void collect_profile(bool enabled);
  std::vector<OperationTotal> profile();  // in the order of kOperationNames; empty while it is off

  int64_t n_tokens() const { return int64_t(inputs_.size()); }
  int64_t n_context() const { return n_context_; }
  size_t kv_bytes() const { return cache_.n_bytes(); }
  const ModelConfig& config() const { return model_->config(); }
  // What a session takes beside its KV cache, about.
  static uint64_t scratch_bytes(const ModelConfig& config);

 private:
  // A token id, or -1 - r for row r of embedding_rows_.
  using Input = int64_t;

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
  void check_room(int64_t n_new) const;
  void push(const int32_t* tokens, int64_t n_tokens);
  void push_rows(const float* rows, int64_t n_rows);
  void compute(int64_t n_before, LogitsFor which, float* logits, const ForwardProgress& progress);
  void drop_inputs(int64_t n_kept);
  void forward(int64_t first, int64_t n, LogitsFor which, float* logits);
  bool run_layer(Worker& worker, int64_t layer, int64_t first, int64_t n);  // false: told to stop
  void project(Worker& worker, int64_t layer, Product product, const float* x, int64_t n, float* out);
  void run_head(Worker& worker, int64_t n, LogitsFor which, float* logits);
  void begin_profile(int64_t first, int64_t n, LogitsFor which);
  void embed(Worker& worker, int64_t first, int64_t n);
  void normalize(Worker& worker, const float* add, const std::vector<float>& weight, int64_t first, int64_t n);
  void store_keys_and_values(Worker& worker, int64_t layer, int64_t first, int64_t n);
  void attend(Worker& worker, int64_t layer, int64_t first, int64_t n);
  void multiply_gate(Worker& worker, int64_t n);
  bool should_stop();

  static constexpr int64_t kBatch = 128;  // tokens computed together: their activations stay in the second-level cache

  std::shared_ptr<Model> model_;
  int64_t n_context_;
  KvCache cache_;
  std::vector<Input> inputs_;
  std::vector<float> embedding_rows_;  // of the inputs that are not tokens, in order
  int64_t n_cached_ = 0;               // leading inputs whose keys and values are valid
  Regime cached_as_;                   // how those were computed
  std::shared_ptr<const Adapter> adapter_;
  double adapter_scale_ = 0.0;

  // Scratch of one batch.
  int64_t q_dim_, kv_dim_;
  AlignedArray<float> x_, normed_, qkv_, attention_, gate_up_, ffn_, delta_, cosine_, sine_;
  ActivationBuffer activations_;
  LowRank low_rank_;
  std::vector<AlignedArray<uint8_t>> thread_scratch_;
  WorkCounters counters_;

  std::unique_ptr<InputSquares> squares_;
  bool wants_squares_ = false;
  InputSquares* active_squares_ = nullptr;  // of this batch

  std::unique_ptr<Profile> profile_;  // null: off

  std::atomic<bool> in_use_{false};
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> stop_{false};
  const ForwardProgress* progress_ = nullptr;
  std::exception_ptr progress_error_;
  int64_t done_ = 0, total_ = 0;
  std::chrono::steady_clock::time_point last_check_;
};

// What the weights of a file and one session take.  Throws InputError for a context that no model has.
MemoryNeed memory_need(const gguf::File& file, const ModelConfig& config, int64_t n_context, KvType kv_type);

}  // namespace phi4edge
