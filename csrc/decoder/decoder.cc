#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "kernels/dispatch.h"

namespace phi4edge {
namespace {

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

}  // namespace

Model::Model(const gguf::File& file, int n_threads, const std::string& isa, const LoadProgress& progress)
    : kernels_(select_kernels(isa)),
      config_(read_config(file)),
      layout_(tensor_layout(file, config_)),
      pool_(n_threads),
      scratch_(config_, kernels_, n_threads),
      weights_(load_weights(file, config_, pool_, progress)) {}

Session::Session(std::shared_ptr<Model> model, int64_t n_context, KvType kv_type)
    : model_(std::move(model)), n_context_(checked_context(n_context)), cache_(config(), n_context, kv_type) {}

MemoryNeed memory_need(const gguf::File& file, const ModelConfig& config, int64_t n_context, KvType kv_type) {
  checked_context(n_context);
  return {weight_bytes(file, config), KvCache::bytes_for(config, n_context, kv_type), Scratch::n_bytes(config)};
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
  const Part part{this, this->n_tokens()};
  push(tokens, n_tokens);
  compute({&part, 1}, which, logits, progress);
}

void Session::extend_embeddings(const float* rows, int64_t n_rows, LogitsFor which, float* logits,
                                const ForwardProgress& progress) {
  const OneAtATime guard(in_use_);
  const Part part{this, n_tokens()};
  push_rows(rows, n_rows);
  compute({&part, 1}, which, logits, progress);
}

void Session::extend_together(std::span<Extension> extensions, LogitsFor which, float* logits,
                              const ForwardProgress& progress) {
  if (extensions.empty()) return;
  std::deque<OneAtATime> guards;
  for (const Extension& each : extensions) {
    if (each.session->model_ != extensions.front().session->model_) {
      throw InputError("the sessions are not all of one model", "extend those of each model by themselves");
    }
    const auto same = [&](const Extension& other) { return other.session == each.session; };
    if (std::count_if(extensions.begin(), extensions.end(), same) > 1) throw InputError("a session is there twice");
    guards.emplace_back(each.session->in_use_);
  }
  // Sessions with the same adapter are neighbours in a pass.
  std::vector<size_t> order(extensions.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return extensions[a].session->adapter_order() < extensions[b].session->adapter_order();
  });
  std::vector<Part> parts;
  parts.reserve(extensions.size());
  int64_t n_logits = 0;
  size_t at = 0;
  try {
    for (const size_t i : order) {
      at = i;
      Extension& each = extensions[i];
      each.first_logits = n_logits;
      n_logits += logits_rows(which, each.n_tokens);
      parts.push_back({each.session, each.session->n_tokens()});
      each.session->push(each.tokens, each.n_tokens);
    }
  } catch (const InputError& error) {
    drop_new(parts);
    throw InputError(text("sessions[", at, "]: ", error.what()), error.hint());
  } catch (...) {
    drop_new(parts);
    throw;
  }
  compute(parts, which, logits, progress);
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
    low_rank_ = LowRank(kMaxRows, Scratch::widest_input(config()), adapter->max_total_rank(), adapter->max_parts(),
                        model_->pool().size());
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

// The next inputs to compute, n_most of them at most.  Old ones (those of append(), and those that are computed again) may
// share a pass with new ones, to which the logits and the squares belong.
Slice Session::next_slice(int64_t n_before, int64_t n_most, LogitsFor which) {
  const int64_t first = n_cached_, n = std::min(n_most, n_tokens() - first);
  const int64_t n_new = std::clamp<int64_t>(first + n - n_before, 0, n);
  const bool is_last = first + n == n_tokens();
  int64_t n_logits = 0;
  if (which == LogitsFor::kAll) n_logits = n_new;
  if (which == LogitsFor::kLast && is_last) n_logits = std::min<int64_t>(n_new, 1);
  return {&cache_,
          inputs_.data() + first,
          embedding_rows_.data(),
          first,
          n,
          n_logits,
          cached_as_.long_factors,
          adapter_.get(),
          adapter_scale_,
          &low_rank_,
          wants_squares_ ? squares_.get() : nullptr,
          n_new};
}

// Passes are filled with the sessions in their order, so that each is computed in one go, and the logits come in that order
// too.
void Session::compute(std::span<const Part> parts, LogitsFor which, float* logits, const ForwardProgress& progress) {
  try {
    int64_t total = 0;
    std::vector<const std::atomic<bool>*> cancelled;
    for (const auto& [session, n_before] : parts) {
      const int64_t n = session->n_tokens();
      session->n_cached_ = session->n_reusable(n);
      session->cached_as_ = session->regime_of(n);
      session->cancelled_ = false;
      cancelled.push_back(&session->cancelled_);
      total += n - session->n_cached_;
    }
    Watch watch(progress, total, std::move(cancelled));
    Profile* profile = parts.front().session->profile_.get();
    while (total > 0) {
      std::vector<Slice> slices;
      std::vector<Session*> sessions;
      int64_t n_rows = 0;
      for (const auto& [session, n_before] : parts) {
        if (n_rows == kMaxRows || session->n_cached_ == session->n_tokens()) continue;
        slices.push_back(session->next_slice(n_before, kMaxRows - n_rows, which));
        sessions.push_back(session);
        n_rows += slices.back().n;
      }
      if (profile) profile->begin_pass();
      Forward forward(*parts.front().session->model_, slices);
      forward.run(logits, watch, profile);
      if (logits) logits += forward.n_logits() * forward.vocab_size();
      for (size_t i = 0; i < slices.size(); ++i) sessions[i]->n_cached_ += slices[i].n;
      watch.advance(n_rows);
      total -= n_rows;
    }
    watch.finish();
  } catch (...) {
    drop_new(parts);
    throw;
  }
}

void Session::drop_new(std::span<const Part> parts) {
  for (const auto& [session, n_before] : parts) session->drop_inputs(n_before);
}

}  // namespace phi4edge
