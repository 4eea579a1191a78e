#include "decoder/kv_cache.h"

#include <cstring>

namespace phi4edge {
namespace {

int64_t round_up16(int64_t n) { return (n + 15) / 16 * 16; }

size_t head_bytes_for(const ModelConfig& config, int64_t n_positions, KvType type) {
  return size_t(round_up16(n_positions)) * size_t(round_up16(config.head_dim)) * (type == KvType::kF16 ? 2 : 4);
}

}  // namespace

size_t KvCache::bytes_for(const ModelConfig& config, int64_t n_positions, KvType type) {
  return 2 * head_bytes_for(config, n_positions, type) * size_t(config.n_kv_heads) * size_t(config.n_layers);
}

KvCache::KvCache(const ModelConfig& config, int64_t n_positions, KvType type)
    : type_(type),
      n_layers_(config.n_layers),
      head_dim_(config.head_dim),
      value_dim_(round_up16(config.head_dim)),
      panel_bytes_(head_bytes_for(config, kPanelRows, type)),
      head_bytes_(head_bytes_for(config, n_positions, type)),
      layer_bytes_(head_bytes_ * size_t(config.n_kv_heads)) {
  keys_ = allocate_aligned<uint8_t>(layer_bytes_ * size_t(n_layers_), "the KV cache");
  values_ = allocate_aligned<uint8_t>(layer_bytes_ * size_t(n_layers_), "the KV cache");
}

void KvCache::store(int64_t layer, int64_t kv_head, int64_t position, const float* key, const float* value,
                    const KernelTable& kernels) {
  constexpr int64_t kLargestHead = 1024;  // read_config() allows no more
  uint8_t* k = keys_.get() + offset(layer, kv_head);
  uint8_t* v = values_.get() + offset(layer, kv_head);
  const int64_t key_at = position / kPanelRows * head_dim_ * kPanelRows + position % kPanelRows;
  if (type_ == KvType::kF16) {
    uint16_t half[kLargestHead];
    kernels.to_half(key, head_dim_, half);
    auto* keys = reinterpret_cast<uint16_t*>(k) + key_at;
    for (int64_t d = 0; d < head_dim_; ++d) keys[d * kPanelRows] = half[d];
    auto* values = reinterpret_cast<uint16_t*>(v) + position * value_dim_;
    kernels.to_half(value, head_dim_, values);
    std::memset(values + head_dim_, 0, size_t(value_dim_ - head_dim_) * 2);
  } else {
    auto* keys = reinterpret_cast<float*>(k) + key_at;
    for (int64_t d = 0; d < head_dim_; ++d) keys[d * kPanelRows] = key[d];
    auto* values = reinterpret_cast<float*>(v) + position * value_dim_;
    std::memcpy(values, value, size_t(head_dim_) * 4);
    std::memset(values + head_dim_, 0, size_t(value_dim_ - head_dim_) * 4);
  }
}

void KvCache::copy(const KvCache& other, int64_t n_positions) {
  const size_t n_bytes = panel_bytes_ * size_t((n_positions + kPanelRows - 1) / kPanelRows);
  for (int64_t layer = 0; layer < n_layers_; ++layer) {
    for (int64_t head = 0; head < int64_t(layer_bytes_ / head_bytes_); ++head) {
      std::memcpy(keys_.get() + offset(layer, head), other.keys_.get() + other.offset(layer, head), n_bytes);
      std::memcpy(values_.get() + offset(layer, head), other.values_.get() + other.offset(layer, head), n_bytes);
    }
  }
}

const void* KvCache::keys(int64_t layer, int64_t kv_head) const { return keys_.get() + offset(layer, kv_head); }
const void* KvCache::values(int64_t layer, int64_t kv_head) const { return values_.get() + offset(layer, kv_head); }

}  // namespace phi4edge
