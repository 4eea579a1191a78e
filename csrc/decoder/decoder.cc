#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "kernels/dispatch.h"

namespace phi4edge {
namespace {

constexpr int64_t kQueryTokens = 8;                       // tokens whose queries meet a KV head together
constexpr size_t kLoopsPerLayer = 40, kLoopsOutside = 8;  // more than there are, each matrix being one; see Worker::share

int64_t round_up16(int64_t n) { return (n + 15) / 16 * 16; }

// A call while another one runs, in another thread or from its progress function, would corrupt the sequence: it is refused.
class OneAtATime {
 public:
  explicit OneAtATime(std::atomic<bool>& in_use) : in_use_(in_use) {
    if (in_use_.exchange(true))
      throw InputError("this session is in use", "make one call at a time, and none from a progress function");
  }
  ~OneAtATime() { in_use_.store(false); }
  OneAtATime(const OneAtATime&) = delete;
  OneAtATime& operator=(const OneAtATime&) = delete;

 private:
  std::atomic<bool>& in_use_;
};

constexpr int64_t kLargestContext = int64_t(1) << 24;  // keeps every size below far from overflowing

int64_t checked_context(int64_t n_context) {
  if (n_context < 1 || n_context > kLargestContext) {
    throw InputError("a context of " + std::to_string(n_context) + " tokens is not in 1.." + std::to_string(kLargestContext));
  }
  return n_context;
}

size_t attention_scratch(const KernelTable& kernels, const ModelConfig& config, int64_t value_dim) {
  const int n_queries = int(kQueryTokens * (config.n_heads / config.n_kv_heads));
  return kernels.attention_scratch_bytes(n_queries, int(value_dim)) +
         size_t(n_queries) * (2 * size_t(config.head_dim) * sizeof(float) + 2 * sizeof(int64_t)) + 8 * kCacheLine;
}

}  // namespace

Model::Model(const gguf::File& file, int n_threads, const std::string& isa, const LoadProgress& progress)
    : kernels_(select_kernels(isa)),
      config_(read_config(file)),
      layout_(tensor_layout(file, config_)),
      pool_(n_threads),
      weights_(load_weights(file, config_, pool_, progress)) {}

Session::Session(std::shared_ptr<Model> model, int64_t n_context, KvType kv_type)
    : model_(std::move(model)),
      n_context_(checked_context(n_context)),
      cache_(config(), n_context, kv_type),
      q_dim_(config().n_heads * config().head_dim),
      kv_dim_(config().n_kv_heads * config().head_dim),
      activations_(kBatch, std::max({config().hidden_size, q_dim_, config().ffn_size})),
      counters_(size_t(config().n_layers) * kLoopsPerLayer + kLoopsOutside) {
  const ModelConfig& c = config();
  const auto allocate = [](int64_t columns) {
    return allocate_aligned<float>(size_t(kBatch) * size_t(columns), "activations");
  };
  x_ = allocate(c.hidden_size);
  normed_ = allocate(c.hidden_size);
  delta_ = allocate(c.hidden_size);
  qkv_ = allocate(q_dim_ + 2 * kv_dim_);
  attention_ = allocate(q_dim_);
  gate_up_ = allocate(2 * c.ffn_size);
  ffn_ = allocate(c.ffn_size);
  cosine_ = allocate(c.rope.n_dims / 2);
  sine_ = allocate(c.rope.n_dims / 2);
  const size_t scratch =
      std::max(model_->kernels().matmul_scratch_bytes(kBatch), attention_scratch(model_->kernels(), c, cache_.value_dim()));
  for (int thread = 0; thread < model_->pool().size(); ++thread) {
    thread_scratch_.push_back(allocate_aligned<uint8_t>(scratch, "scratch"));
  }
}

uint64_t Session::scratch_bytes(const ModelConfig& c) {
  const int64_t q_dim = c.n_heads * c.head_dim, kv_dim = c.n_kv_heads * c.head_dim;
  const int64_t floats = 3 * c.hidden_size + 2 * q_dim + 2 * kv_dim + 3 * c.ffn_size + c.rope.n_dims;
  const int64_t quantized = 2 * std::max({c.hidden_size, q_dim, c.ffn_size});  // codes and side arrays: 1.75 bytes a value
  return size_t(kBatch) * size_t(floats * int64_t(sizeof(float)) + quantized) + size_t(c.vocab_size) * sizeof(float);
}

MemoryNeed memory_need(const gguf::File& file, const ModelConfig& config, int64_t n_context, KvType kv_type) {
  checked_context(n_context);
  return {weight_bytes(file, config), KvCache::bytes_for(config, n_context, kv_type), Session::scratch_bytes(config)};
}

void Session::check_room(int64_t n_new) const {
  if (n_new < 0 || n_new > n_context_ - n_tokens()) {
    throw InputError("the sequence would have " + std::to_string(n_tokens() + n_new) + " tokens, and the context holds " +
                         std::to_string(n_context_),
                     "shorten the prompt, or load the model with a larger context");
  }
}

void Session::extend(const int32_t* tokens, int64_t n_tokens, LogitsFor which, float* logits, const ForwardProgress& progress) {
  const OneAtATime guard(in_use_);
  const int64_t n_before = this->n_tokens();
  push(tokens, n_tokens);
  compute(n_before, which, logits, progress);
}

void Session::extend_embeddings(const float* rows, int64_t n_rows, LogitsFor which, float* logits,
                                const ForwardProgress& progress) {
  const OneAtATime guard(in_use_);
  const int64_t n_before = n_tokens();
  push_rows(rows, n_rows);
  compute(n_before, which, logits, progress);
}

void Session::append(const int32_t* tokens, int64_t n_tokens) {
  const OneAtATime guard(in_use_);
  push(tokens, n_tokens);
}

void Session::append_embeddings(const float* rows, int64_t n_rows) {
  const OneAtATime guard(in_use_);
  push_rows(rows, n_rows);
}

void Session::push(const int32_t* tokens, int64_t n_tokens) {
  check_room(n_tokens);
  for (int64_t i = 0; i < n_tokens; ++i) {
    if (tokens[i] < 0 || tokens[i] >= config().vocab_size) {
      throw InputError("token " + std::to_string(tokens[i]) + " at position " + std::to_string(i) + " is not in 0.." +
                       std::to_string(config().vocab_size - 1));
    }
  }
  inputs_.insert(inputs_.end(), tokens, tokens + n_tokens);
}

void Session::push_rows(const float* rows, int64_t n_rows) {
  check_room(n_rows);
  const int64_t hidden = config().hidden_size;
  for (int64_t i = 0; i < n_rows * hidden; ++i) {
    if (!std::isfinite(rows[i])) throw InputError("row " + std::to_string(i / hidden) + " of the embeddings is not finite");
  }
  const int64_t first_row = int64_t(embedding_rows_.size()) / hidden;
  inputs_.reserve(inputs_.size() + size_t(n_rows));  // so that the two grow together or not at all
  embedding_rows_.insert(embedding_rows_.end(), rows, rows + n_rows * hidden);
  for (int64_t i = 0; i < n_rows; ++i) inputs_.push_back(-1 - (first_row + i));
}

void Session::set_adapter(std::shared_ptr<const Adapter> adapter, double scale) {
  const OneAtATime guard(in_use_);
  if (!std::isfinite(scale)) throw InputError(text("the scale of an adapter must be a finite number, got ", scale));
  if (scale == 0.0) adapter = nullptr;
  if (!adapter) {
    adapter_ = nullptr;
    adapter_scale_ = 0.0;
    return;
  }
  if (&adapter->model() != model_.get()) {
    throw InputError("the adapter was loaded for another model", "load it for the model of this session");
  }
  if (std::abs(scale) * adapter->max_scale() > double(std::numeric_limits<float>::max())) {
    throw InputError(text("the scale ", scale, " of the adapter is too large"));
  }
  if (!low_rank_.fits(*adapter)) {
    low_rank_ = LowRank(kBatch, adapter->max_total_rank(), adapter->max_parts(), model_->pool().size());
  }
  adapter_ = std::move(adapter);
  adapter_scale_ = scale;
}

void Session::collect_input_squares(bool enabled) {
  const OneAtATime guard(in_use_);
  if (enabled) squares_ = std::make_unique<InputSquares>(model_->layout());
  wants_squares_ = enabled;
}

std::vector<InputSquares::Entry> Session::input_squares() {
  const OneAtATime guard(in_use_);
  return squares_ ? squares_->entries() : std::vector<InputSquares::Entry>();
}

void Session::collect_profile(bool enabled) {
  const OneAtATime guard(in_use_);
  profile_ = enabled ? std::make_unique<Profile>(model_->pool().size()) : nullptr;
}

std::vector<OperationTotal> Session::profile() {
  const OneAtATime guard(in_use_);
  return profile_ ? profile_->totals() : std::vector<OperationTotal>();
}

void Session::truncate(int64_t n_tokens) {
  const OneAtATime guard(in_use_);
  if (n_tokens < 0 || n_tokens > this->n_tokens()) {
    throw InputError("cannot keep " + std::to_string(n_tokens) + " of " + std::to_string(this->n_tokens()) + " tokens");
  }
  drop_inputs(n_tokens);
}

void Session::grow(int64_t n_context) {
  const OneAtATime guard(in_use_);
  if (checked_context(n_context) < n_context_) {
    throw InputError(text("a context of ", n_context_, " tokens cannot shrink to ", n_context));
  }
  KvCache larger(config(), n_context, cache_.type());
  larger.copy(cache_, n_cached_);
  cache_ = std::move(larger);
  n_context_ = n_context;
}

void Session::drop_inputs(int64_t n_kept) {
  int64_t n_rows = 0;
  for (int64_t i = 0; i < n_kept; ++i) n_rows += inputs_[size_t(i)] < 0;
  inputs_.resize(size_t(n_kept));
  embedding_rows_.resize(size_t(n_rows * config().hidden_size));
  n_cached_ = std::min(n_cached_, n_kept);
}

void Session::compute(int64_t n_before, LogitsFor which, float* logits, const ForwardProgress& progress) {
  const int64_t n = n_tokens();
  n_cached_ = n_reusable(n);
  cached_as_ = regime_of(n);
  cancelled_ = stop_ = false;
  progress_ = &progress;
  done_ = 0, total_ = n - n_cached_;
  last_check_ = std::chrono::steady_clock::now();
  int64_t n_logits = 0;
  try {
    for (int64_t first = n_cached_; first < n;) {
      // Old inputs (those of append(), and those that are computed again) share a batch with new ones where these are not told
      // apart afterwards.
      const bool splits = which == LogitsFor::kAll || wants_squares_;
      const int64_t limit = splits && first < n_before ? n_before : n;
      const int64_t batch = std::min(kBatch, limit - first);
      const bool last = first + batch == n;
      const bool has_new = first + batch > n_before;
      const LogitsFor wanted = !has_new || (which == LogitsFor::kLast && !last) ? LogitsFor::kNone : which;
      active_squares_ = wants_squares_ && first >= n_before ? squares_.get() : nullptr;
      forward(first, batch, wanted, wanted == LogitsFor::kNone ? nullptr : logits + n_logits * config().vocab_size);
      if (wanted == LogitsFor::kAll) n_logits += batch;
      first += batch;
      n_cached_ = first;
      done_ += batch;
    }
    if (progress && !progress(done_, total_)) throw CancelledError();
  } catch (...) {
    drop_inputs(n_before);
    throw;
  }
}

// Asks the caller, at most every 50 ms; signal handlers and progress bars live there.
bool Session::should_stop() {
  if (cancelled_.load(std::memory_order_relaxed)) return true;
  if (!*progress_) return false;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_check_ < std::chrono::milliseconds(50)) return false;
  last_check_ = now;
  try {
    return !(*progress_)(done_, total_);
  } catch (...) {  // this is between two barriers, where the other threads would wait for ever
    progress_error_ = std::current_exception();
    return true;
  }
}

void Session::forward(int64_t first, int64_t n, LogitsFor which, float* logits) {
  const RopeConfig& rope = config().rope;
  if (profile_) begin_profile(first, n, which);
  for (int64_t t = 0; t < n; ++t) {
    rope_angles(rope, cached_as_.long_factors, first + t, cosine_.get() + t * (rope.n_dims / 2),
                sine_.get() + t * (rope.n_dims / 2));
  }
  counters_.reset();
  model_->pool().run([&](int thread) {
    Worker worker{thread, model_->pool().size(), model_->pool().barrier(), counters_, thread_scratch_[size_t(thread)].get()};
    worker.profile = profile_.get();
    worker.done(Operation::kStart);
    embed(worker, first, n);
    worker.done(Operation::kEmbed);
    for (int64_t layer = 0; layer < config().n_layers; ++layer) {
      if (!run_layer(worker, layer, first, n)) return;
    }
    if (which != LogitsFor::kNone) run_head(worker, n, which, logits);
  });
  if (profile_) profile_->end_pass();
  if (progress_error_) std::rethrow_exception(std::exchange(progress_error_, nullptr));
  if (stop_) throw CancelledError();
}

void Session::begin_profile(int64_t first, int64_t n, LogitsFor which) {
  const ModelConfig& c = config();
  const PanelMatrix& table = model_->weights().embedding;
  const int64_t n_seen = c.sliding_window > 0 ? std::min(first + n, c.sliding_window + n - 1) : first + n;
  profile_->add_work(model_->weights(), adapter_.get(), n, which == LogitsFor::kAll ? n : which == LogitsFor::kLast ? 1 : 0);
  profile_->add_bytes(Operation::kEmbed, uint64_t(n) * table.panel_bytes / kPanelRows);
  profile_->add_bytes(Operation::kAttention, uint64_t(n_seen) * KvCache::bytes_per_token(c, cache_.type()));
  profile_->begin_pass();
}

void Session::embed(Worker& worker, int64_t first, int64_t n) {
  const PanelMatrix& table = model_->weights().embedding;
  const int64_t hidden = config().hidden_size;
  worker.share(n, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Input input = inputs_[size_t(first + t)];
      float* row = x_.get() + t * hidden;
      if (input < 0) {
        std::memcpy(row, embedding_rows_.data() + (-1 - input) * hidden, size_t(hidden) * sizeof(float));
      } else {
        const uint8_t* panel = table.data.get() + size_t(input / kPanelRows) * table.panel_bytes;
        model_->kernels().dequantize_row[format_index(*table.format)](panel, int(input % kPanelRows), hidden, row);
      }
    }
  });
}

bool Session::run_layer(Worker& worker, int64_t layer, int64_t first, int64_t n) {
  const LayerWeights& w = model_->weights().layers[size_t(layer)];
  const float* pending = layer == 0 ? nullptr : delta_.get();  // what the layer before has still to add

  if (layer == 0) worker.wait();  // for the embeddings
  if (worker.thread == 0 && should_stop()) stop_.store(true);
  normalize(worker, pending, w.attention_norm, 0, n);
  worker.done(Operation::kNorm);
  worker.wait();
  if (stop_.load()) return false;  // written before the barrier: all threads leave together
  project(worker, layer, Product::kQkv, normed_.get(), n, qkv_.get());
  worker.wait();
  store_keys_and_values(worker, layer, first, n);
  worker.done(Operation::kRopeAndStore);
  worker.wait();
  attend(worker, layer, first, n);
  worker.done(Operation::kAttention);
  worker.wait();
  worker.share(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) activations_.quantize(attention_.get() + t * q_dim_, t, n, q_dim_, model_->kernels());
  });
  worker.done(Operation::kAttention);
  worker.wait();
  project(worker, layer, Product::kAttentionOutput, attention_.get(), n, delta_.get());
  worker.wait();
  normalize(worker, delta_.get(), w.ffn_norm, 0, n);
  worker.done(Operation::kNorm);
  worker.wait();
  project(worker, layer, Product::kGateUp, normed_.get(), n, gate_up_.get());
  worker.wait();
  multiply_gate(worker, n);
  worker.done(Operation::kSilu);
  worker.wait();
  project(worker, layer, Product::kDown, ffn_.get(), n, delta_.get());
  worker.wait();
  return true;
}

// One of the layer's products: out[token] = W x[token], x being quantised already; and what the adapter adds to it.
void Session::project(Worker& worker, int64_t layer, Product product, const float* x, int64_t n, float* out) {
  const std::span<const PanelMatrix> matrices = model_->weights().layers[size_t(layer)].product(product);
  const KernelTable& kernels = model_->kernels();
  int64_t n_rows = 0;
  for (const PanelMatrix& matrix : matrices) n_rows += matrix.n_rows;
  const int64_t n_columns = matrices.front().n_columns;
  const Activations input = activations_.view(n, n_columns, x, n_columns);
  const LowRankUpdate* update = adapter_ ? adapter_->update(layer, product) : nullptr;

  if (active_squares_) active_squares_->add(worker, active_squares_->at(layer, product), x, n);
  if (update) {
    low_rank_.multiply_a(worker, kernels, *update, input);
    worker.done(Operation::kAdapterA);
  }
  matmul(worker, kernels, matrices, input, out, n_rows);
  worker.done(operation_of(product));
  if (!update) return;
  worker.wait();
  low_rank_.add_b(worker, kernels, *update, n, adapter_scale_, out, n_rows);
  worker.done(Operation::kAdapterB);
}

// x += add (when there is one); then the quantised rms_norm(x) of tokens first .. n - 1.
void Session::normalize(Worker& worker, const float* add, const std::vector<float>& weight, int64_t first, int64_t n) {
  const int64_t hidden = config().hidden_size;
  worker.share(n - first, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = first + begin; t < first + end; ++t) {
      float *x = x_.get() + t * hidden, *normed = normed_.get() + (t - first) * hidden;
      if (add) {
        for (int64_t i = 0; i < hidden; ++i) x[i] += add[t * hidden + i];
      }
      rms_norm(x, weight.data(), hidden, config().rms_epsilon, normed);
      activations_.quantize(normed, t - first, n - first, hidden, model_->kernels());
    }
  });
}

void Session::store_keys_and_values(Worker& worker, int64_t layer, int64_t first, int64_t n) {
  const ModelConfig& c = config();
  const int64_t half = c.rope.n_dims / 2, stride = q_dim_ + 2 * kv_dim_;
  worker.share(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float *q = qkv_.get() + t * stride, *k = q + q_dim_, *v = k + kv_dim_;
      const float *cosine = cosine_.get() + t * half, *sine = sine_.get() + t * half;
      for (int64_t head = 0; head < c.n_heads; ++head) rotate(c.rope, cosine, sine, q + head * c.head_dim);
      for (int64_t head = 0; head < c.n_kv_heads; ++head) {
        rotate(c.rope, cosine, sine, k + head * c.head_dim);
        cache_.store(layer, head, first + t, k + head * c.head_dim, v + head * c.head_dim, model_->kernels());
      }
    }
  });
}

void Session::attend(Worker& worker, int64_t layer, int64_t first, int64_t n) {
  const ModelConfig& c = config();
  const int64_t group = c.n_heads / c.n_kv_heads, n_tiles = (n + kQueryTokens - 1) / kQueryTokens;
  const int64_t head_dim = c.head_dim, stride = q_dim_ + 2 * kv_dim_;
  const float scale = 1.0f / std::sqrt(float(head_dim));
  const auto kernel = model_->kernels().attention[int(cache_.type())];
  // Scratch: the queries of a tile side by side, their outputs, the keys they see, and the kernel's own.
  const int64_t max_queries = kQueryTokens * group;
  auto* queries = static_cast<float*>(worker.scratch);
  float* out = queries + round_up16(max_queries * head_dim);
  auto* first_key = reinterpret_cast<int64_t*>(out + round_up16(max_queries * head_dim));
  int64_t* last_key = first_key + round_up16(max_queries);
  static_assert(sizeof(int64_t) * 16 % kCacheLine == 0);
  worker.share(c.n_kv_heads * n_tiles, 1, [&](int64_t item, int64_t) {
    // Long rows first: later tiles see more keys.
    const int64_t tile = n_tiles - 1 - item / c.n_kv_heads, kv_head = item % c.n_kv_heads;
    const int64_t t0 = tile * kQueryTokens, n_tokens = std::min(kQueryTokens, n - t0);
    for (int64_t i = 0; i < n_tokens * group; ++i) {
      const int64_t t = t0 + i / group, head = kv_head * group + i % group;
      const float* q = qkv_.get() + t * stride + head * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) queries[i * head_dim + d] = q[d] * scale;
      cache_.spread(queries + i * head_dim);
      last_key[i] = first + t;
      first_key[i] = c.sliding_window > 0 ? std::max<int64_t>(0, first + t - c.sliding_window + 1) : 0;
    }
    kernel({queries, head_dim, int(n_tokens * group), first_key, last_key, int(head_dim), int(cache_.value_dim()),
            cache_.keys(layer, kv_head), cache_.values(layer, kv_head), out, head_dim, last_key + round_up16(max_queries)});
    for (int64_t i = 0; i < n_tokens * group; ++i) {
      cache_.spread(out + i * head_dim);
      float* to = attention_.get() + (t0 + i / group) * q_dim_ + (kv_head * group + i % group) * head_dim;
      std::memcpy(to, out + i * head_dim, size_t(head_dim) * sizeof(float));
    }
  });
}

// By super-blocks, so that the threads share the work of a single token too.
void Session::multiply_gate(Worker& worker, int64_t n) {
  const int64_t ffn = config().ffn_size, n_super = (ffn + kSuperBlock - 1) / kSuperBlock;
  worker.share(n * n_super, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / n_super, sb = item % n_super, first = sb * kSuperBlock;
      const int64_t n_columns = std::min<int64_t>(kSuperBlock, ffn - first);
      const float* gate = gate_up_.get() + t * 2 * ffn + first;
      float* out = ffn_.get() + t * ffn + first;
      model_->kernels().silu_multiply(gate, gate + ffn, n_columns, out);
      activations_.quantize(out, sb * n + t, n, n_columns, model_->kernels());
    }
  });
}

void Session::run_head(Worker& worker, int64_t n, LogitsFor which, float* logits) {
  const ModelConfig& c = config();
  const Weights& w = model_->weights();
  const int64_t first = which == LogitsFor::kLast ? n - 1 : 0;
  normalize(worker, delta_.get(), w.output_norm, first, n);
  worker.done(Operation::kNorm);
  worker.wait();
  if (active_squares_) active_squares_->add(worker, active_squares_->at_head(), normed_.get(), n - first);
  matmul(worker, model_->kernels(), {&w.output_head(), 1},
         activations_.view(n - first, c.hidden_size, normed_.get(), c.hidden_size), logits, c.vocab_size);
  worker.done(Operation::kHead);
}

}  // namespace phi4edge
