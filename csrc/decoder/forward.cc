#include "decoder/forward.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "decoder/decoder.h"

namespace phi4edge {

Forward::Forward(Model& model, std::vector<Slice> slices)
    : model_(model),
      config_(model.config()),
      kernels_(model.kernels()),
      scratch_(model.scratch()),
      q_dim_(config_.n_heads * config_.head_dim),
      kv_dim_(config_.n_kv_heads * config_.head_dim),
      queries_per_key_(config_.n_heads / config_.n_kv_heads),
      sums_stride_(Scratch::attention_sums(config_)),
      slices_(std::move(slices)),
      counters_(n_loops(), model.pool().size()),
      scales_(model.weights().activation_scales) {
  for (const Slice& slice : slices_) add_rows(slice);
  for (const Group& group : groups_) {
    if (group.adapter) scales_ |= group.adapter->activation_scales();
  }
  if (n_segments_ > 1 && n_rows() <= kQueryTokens) {
    segment_sums_.resize(tiles_.size() * size_t(config_.n_kv_heads * n_segments_ * sums_stride_));
  }
  std::stable_sort(tiles_.begin(), tiles_.end(),
                   [](const Tile& a, const Tile& b) { return a.position + a.n > b.position + b.n; });
  const size_t half = size_t(config_.rope.n_dims / 2);
  cosine_.resize(rows_.size() * half);
  sine_.resize(rows_.size() * half);
  for (size_t row = 0; row < rows_.size(); ++row) {
    rope_angles(config_.rope, rows_[row].slice->long_factors, rows_[row].position, cosine_.data() + row * half,
                sine_.data() + row * half);
  }
}

void Forward::add_rows(const Slice& slice) {
  const int64_t first_row = n_rows();
  if (groups_.empty() || groups_.back().adapter != slice.adapter || groups_.back().scale != slice.scale) {
    groups_.push_back({slice.adapter, slice.scale, slice.low_rank, first_row, 0});
  }
  groups_.back().n_rows += slice.n;
  for (int64_t i = 0; i < slice.n; ++i) {
    if (i >= slice.n - slice.n_logits) head_rows_.push_back(n_rows());
    rows_.push_back({&slice, groups_.size() - 1, slice.first + i});
  }
  add_tiles(slice, first_row);
}

// More than Worker::share() is called, each matrix being one.
size_t Forward::n_loops() const {
  constexpr size_t kLoops = 16, kLoopsOutside = 4;            // of a layer; for embeddings and the head
  constexpr size_t kLoopsAdapter = 7;                         // A of q, k, v, output, gate, up, down
  constexpr size_t kLoopsSquares = std::size(kProducts) + 1;  // of a slice, the head's among them
  const size_t n = slices_.size();
  return size_t(config_.n_layers) * (kLoops + n * (kLoopsAdapter + kLoopsSquares)) + kLoopsOutside + n * kLoopsSquares;
}

void Forward::add_work(Profile& profile) const {
  const Weights& weights = model_.weights();
  profile.add_weights(weights, n_rows(), n_logits());
  for (const Group& group : groups_) {
    if (group.adapter) profile.add_adapter(*group.adapter, config_.n_layers, group.n_rows);
  }
  profile.add_bytes(Operation::kEmbed, uint64_t(n_rows()) * weights.embedding.panel_bytes / kPanelRows);
  for (const Slice& slice : slices_) {
    const int64_t n_seen = slice.first + slice.n, window = config_.sliding_window;
    profile.add_bytes(Operation::kAttention, uint64_t(window > 0 ? std::min(n_seen, window + slice.n - 1) : n_seen) *
                                                 KvCache::bytes_per_token(config_, slice.cache->type()));
  }
}

void Forward::run(float* logits, Watch& watch, Profile* profile) {
  if (profile) add_work(*profile);
  model_.pool().run([&](int thread) {
    Worker worker{thread, model_.pool().size(), model_.pool().barrier(), counters_,
                  scratch_.thread_scratch[size_t(thread)].get()};
    worker.profile = profile;
    worker.done(Operation::kStart);
    embed(worker);
    worker.done(Operation::kEmbed);
    for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
      if (!run_layer(worker, layer, watch)) return;
    }
    if (!head_rows_.empty()) run_head(worker, logits);
  });
  if (profile) profile->end_pass();
  if (stop_) watch.throw_reason();
}

void Forward::embed(Worker& worker) {
  const PanelMatrix& table = model_.weights().embedding;
  const int64_t hidden = config_.hidden_size;
  worker.share(n_rows(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto& [slice, group, position] = rows_[size_t(row)];
      const Input input = slice->inputs[position - slice->first];
      float* x = scratch_.x.get() + row * hidden;
      if (input < 0) {
        std::memcpy(x, slice->embedding_rows + (-1 - input) * hidden, size_t(hidden) * sizeof(float));
      } else {
        const uint8_t* panel = table.data.get() + size_t(input / kPanelRows) * table.panel_bytes;
        kernels_.dequantize_row[format_index(*table.format)](panel, int(input % kPanelRows), hidden, x);
      }
    }
  });
}

bool Forward::run_layer(Worker& worker, int64_t layer, Watch& watch) {
  const LayerWeights& w = model_.weights().layers[size_t(layer)];
  Scratch& s = scratch_;
  const float* pending = layer == 0 ? nullptr : s.delta.get();  // what the layer before has still to add

  if (layer == 0) worker.wait();  // for the embeddings
  if (worker.thread == 0 && watch.should_stop()) stop_.store(true);
  normalize(worker, pending, w.attention_norm);
  worker.done(Operation::kNorm);
  worker.wait();
  if (stop_.load()) return false;  // written before the barrier: all threads leave together
  project(worker, layer, Product::kQkv, s.normed.get(), s.qkv.get(), q_dim_ + 2 * kv_dim_);
  worker.wait();
  store_keys_and_values(worker, layer);
  worker.done(Operation::kRopeAndStore);
  worker.wait();
  attend(worker, layer);
  worker.done(Operation::kAttention);
  worker.wait();
  worker.share(n_rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) quantize(s.attention.get() + row * q_dim_, row, 0, q_dim_);
  });
  worker.done(Operation::kAttention);
  worker.wait();
  project(worker, layer, Product::kAttentionOutput, s.attention.get(), s.delta.get(), config_.hidden_size);
  worker.wait();
  normalize(worker, s.delta.get(), w.ffn_norm);
  worker.done(Operation::kNorm);
  worker.wait();
  project(worker, layer, Product::kGateUp, s.normed.get(), s.gate_up.get(), s.gate_up_stride);
  worker.wait();
  multiply_gate(worker);
  worker.done(Operation::kSilu);
  worker.wait();
  project(worker, layer, Product::kDown, s.ffn.get(), s.delta.get(), config_.hidden_size);
  worker.wait();
  return true;
}

// One of the layer's products: out[row] = W x[row], x being quantised already; and what the adapters add to their rows.
void Forward::project(Worker& worker, int64_t layer, Product product, const float* x, float* out, int64_t out_stride) {
  const std::span<const PanelMatrix> matrices = model_.weights().layers[size_t(layer)].product(product);
  const int64_t n_columns = matrices.front().n_columns;
  const Activations input = scratch_.activations.view(n_rows(), n_columns, x, n_columns);
  const auto update_of = [&](const Group& group) { return group.adapter ? group.adapter->update(layer, product) : nullptr; };

  add_squares(worker, layer, product, x, n_columns);
  bool has_update = false;
  for (const Group& group : groups_) {
    const LowRankUpdate* update = update_of(group);
    if (!update) continue;
    has_update = true;
    const float* rows = x + group.first_row * n_columns;
    group.low_rank->multiply_a(worker, kernels_, *update,
                               alone(group) ? input : group.low_rank->input().view(group.n_rows, n_columns, rows, n_columns));
  }
  if (!has_update) {
    matmul(worker, kernels_, matrices, input, out, out_stride);
    worker.done(operation_of(product));
    return;
  }
  worker.done(Operation::kAdapterA);
  worker.wait();
  for (const Group& group : groups_) {
    if (const LowRankUpdate* update = update_of(group)) {
      group.low_rank->quantize_hidden(worker, kernels_, *update, group.n_rows);
    }
  }
  worker.done(Operation::kAdapterB);
  matmul(worker, kernels_, matrices, input, out, out_stride, [&](const Piece& piece) {
    worker.done(operation_of(product));
    for (const Group& group : groups_) {
      const LowRankUpdate* update = update_of(group);
      if (!update) continue;
      group.low_rank->add_b(worker, kernels_, *update, piece, group.n_rows, group.scale, out + group.first_row * out_stride,
                            out_stride);
    }
    worker.done(Operation::kAdapterB);
  });
}

void Forward::add_squares(Worker& worker, int64_t layer, Product product, const float* x, int64_t n_columns) {
  int64_t end = 0;
  for (const Slice& slice : slices_) {
    end += slice.n;
    if (!slice.squares || slice.n_squares == 0) continue;
    const float* rows = x + (end - slice.n_squares) * n_columns;
    slice.squares->add(worker, slice.squares->at(layer, product), rows, slice.n_squares);
  }
}

// Quantises a row of the next product's input, or n_columns of it from a super-block on.  Kernels take rows as they were laid
// out, so that an adapter which has not all of them gets its own once more.
void Forward::quantize(const float* x, int64_t row, int64_t super_block, int64_t n_columns) {
  scratch_.activations.quantize(x, super_block * n_rows() + row, n_rows(), n_columns, scales_, kernels_);
  const Group& group = groups_[rows_[size_t(row)].group];
  if (!group.adapter || alone(group)) return;
  group.low_rank->input().quantize(x, super_block * group.n_rows + row - group.first_row, group.n_rows, n_columns,
                                   group.adapter->activation_scales(), kernels_);
}

// x += add (when there is one); then the quantised rms_norm(x) of all rows.
void Forward::normalize(Worker& worker, const float* add, const std::vector<float>& weight) {
  const int64_t hidden = config_.hidden_size;
  worker.share(n_rows(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* normed = scratch_.normed.get() + row * hidden;
      normalize_row(row, add, weight, normed);
      quantize(normed, row, 0, hidden);
    }
  });
}

void Forward::normalize_row(int64_t row, const float* add, const std::vector<float>& weight, float* out) {
  const int64_t hidden = config_.hidden_size;
  kernels_.rms_norm(scratch_.x.get() + row * hidden, add ? add + row * hidden : nullptr, weight.data(), hidden,
                    config_.rms_epsilon, out);
}

// By super-blocks, so that the threads share the work of a single row too.
void Forward::multiply_gate(Worker& worker) {
  const int64_t ffn = config_.ffn_size, n_super = (ffn + kSuperBlock - 1) / kSuperBlock;
  worker.share(n_rows() * n_super, 8, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / n_super, sb = item % n_super, first = sb * kSuperBlock;
      const int64_t n_columns = std::min<int64_t>(kSuperBlock, ffn - first);
      const float* gate = scratch_.gate_up.get() + row * scratch_.gate_up_stride + first;
      float* out = scratch_.ffn.get() + row * ffn + first;
      kernels_.silu_multiply(gate, gate + ffn, n_columns, out);
      quantize(out, row, sb, n_columns);
    }
  });
}

void Forward::run_head(Worker& worker, float* logits) {
  const Weights& w = model_.weights();
  const int64_t hidden = config_.hidden_size, n = n_logits();
  float* normed = scratch_.normed.get();
  worker.share(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      normalize_row(head_rows_[size_t(i)], scratch_.delta.get(), w.output_norm, normed + i * hidden);
      scratch_.activations.quantize(normed + i * hidden, i, n, hidden, scales_, kernels_);
    }
  });
  worker.done(Operation::kNorm);
  worker.wait();
  const float* rows = normed;
  for (const Slice& slice : slices_) {
    if (slice.squares && slice.n_logits > 0) slice.squares->add(worker, slice.squares->at_head(), rows, slice.n_logits);
    rows += slice.n_logits * hidden;
  }
  matmul(worker, kernels_, {&w.output_head(), 1}, scratch_.activations.view(n, hidden, normed, hidden), logits,
         config_.vocab_size);
  worker.done(Operation::kHead);
}

}  // namespace phi4edge
