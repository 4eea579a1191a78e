#include "decoder/scratch.h"

#include <algorithm>

#include "decoder/kv_cache.h"

namespace phi4edge {
namespace {

int64_t q_dim(const ModelConfig& c) { return c.n_heads * c.head_dim; }
int64_t gate_up_columns(const ModelConfig& c) { return 2 * c.ffn_size + int64_t(kCacheLine / sizeof(float)); }
int64_t kv_dim(const ModelConfig& c) { return c.n_kv_heads * c.head_dim; }

AlignedArray<float> rows(int64_t n_columns) {
  return allocate_aligned<float>(size_t(kMaxRows) * size_t(n_columns), "activations");
}

int n_queries(const ModelConfig& c) { return int(kQueryTokens * (c.n_heads / c.n_kv_heads)); }

int widest_value(const ModelConfig& config) {
  int64_t widest = 0;
  for (const KvFormat& format : kv_formats()) widest = std::max(widest, KvCache::value_dim_for(config, format.type));
  return int(widest);
}

// Laid out in attend.cc.
size_t attention_scratch(const ModelConfig& config, const KernelTable& kernels) {
  const int64_t n = n_queries(config);
  const int64_t floats = Scratch::attention_sums(config) + round_up16(n * config.head_dim);
  return size_t(floats) * sizeof(float) + size_t(2 * round_up16(n)) * sizeof(int64_t) +
         kernels.attention_scratch_bytes(int(n), widest_value(config));
}

}  // namespace

Scratch::Scratch(const ModelConfig& config, const KernelTable& kernels, int n_threads)
    : x(rows(config.hidden_size)),
      normed(rows(config.hidden_size)),
      qkv(rows(q_dim(config) + 2 * kv_dim(config))),
      attention(rows(q_dim(config))),
      gate_up(rows(gate_up_columns(config))),
      ffn(rows(config.ffn_size)),
      delta(rows(config.hidden_size)),
      gate_up_stride(gate_up_columns(config)),
      activations(kMaxRows, widest_input(config)) {
  const size_t n_bytes = std::max(kernels.matmul_scratch_bytes(kMaxRows), attention_scratch(config, kernels));
  for (int thread = 0; thread < n_threads; ++thread) {
    thread_scratch.push_back(allocate_aligned<uint8_t>(n_bytes, "scratch"));
  }
}

int64_t Scratch::attention_sums(const ModelConfig& c) {
  return round_up16(AttentionSums::n_floats(n_queries(c), widest_value(c)));
}

int64_t Scratch::widest_input(const ModelConfig& c) { return std::max({c.hidden_size, q_dim(c), c.ffn_size}); }

uint64_t Scratch::n_bytes(const ModelConfig& c) {
  const int64_t floats = 3 * c.hidden_size + 2 * q_dim(c) + 2 * kv_dim(c) + 3 * c.ffn_size + c.rope.n_dims;
  const int64_t quantized = 4 * widest_input(c);  // codes and side arrays, with both kinds of scales
  return size_t(kMaxRows) * size_t(floats * int64_t(sizeof(float)) + quantized) + size_t(c.vocab_size) * sizeof(float);
}

}  // namespace phi4edge
