#include "decoder/kv_cache.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace phi4edge {
namespace {

constexpr KvFormat kFormats[kKvTypeCount] = {
    {KvType::kI16, "i16", 16, I16Panel::kDimBytes, I16Panel::kScaleBytes / kPanelRows},
    {KvType::kF32, "f32", 16, 64, 0},
    {KvType::kQ8_0, "q8_0", KvBlock::kDims, sizeof(KvBlock) / kPanelRows, 0},
};

const KvFormat& format_of(KvType type) { return kFormats[int(type)]; }

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A key or a value of one head.
size_t row_bytes(const ModelConfig& config, KvType type) {
  const KvFormat& format = format_of(type);
  return size_t(round_up(config.head_dim, format.block_values) / format.block_values * format.block_bytes + format.scale_bytes);
}

size_t head_bytes_for(const ModelConfig& config, int64_t n_positions, KvType type) {
  return size_t(round_up(n_positions, kPanelRows)) * row_bytes(config, type);
}

// Codes of a block of dims of a key and a value, in lines of pairs behind kScaleBytes.
template <int64_t kScaleBytes, class Code>
void store_pairs(const Code* key, const Code* value, int64_t n_dims, int64_t row, uint8_t* keys, uint8_t* values) {
  auto* pairs_of_dims = reinterpret_cast<Code*>(keys + kScaleBytes) + row * 2;
  for (int64_t d = 0; d < n_dims; d += 2) std::memcpy(pairs_of_dims + d * kPanelRows, key + d, 2 * sizeof(Code));
  auto* pairs_of_keys = reinterpret_cast<Code*>(values + kScaleBytes) + row / 2 * 2 * kPanelRows + row % 2;
  for (int64_t d = 0; d < n_dims; ++d) {
    pairs_of_keys[d / kPanelRows * kPanelRows * kPanelRows + d % kPanelRows * 2] = value[d];
  }
}

void store_integers(const float* key, const float* value, int64_t head_dim, int64_t value_dim, int64_t row, uint8_t* keys,
                    uint8_t* values, const KernelTable& kernels) {
  int16_t codes[2][kLargestHead];
  float key_scale = kernels.to_i16(key, head_dim, kI16Keys, codes[0]);
  float value_scale = kernels.to_i16(value, head_dim, kI16Values, codes[1]);
  if (std::isnan(value_scale)) key_scale = value_scale, value_scale = 0;
  store_pairs<I16Panel::kScaleBytes>(codes[0], codes[1], value_dim, row, keys, values);
  reinterpret_cast<float*>(keys)[row] = key_scale;
  reinterpret_cast<float*>(values)[row] = value_scale;
}

// key and value: spread
void store_blocks(const float* key, const float* value, int64_t head_dim, int64_t row, KvBlock* keys, KvBlock* values,
                  const KernelTable& kernels) {
  constexpr int64_t kDims = KvBlock::kDims;
  constexpr uint16_t kInfinity = 0x7c00;
  int8_t codes[2][kLargestHead];
  uint16_t scales[2][kLargestHead / kDims];
  kernels.to_q8(key, head_dim, codes[0], scales[0]);
  kernels.to_q8(value, head_dim, codes[1], scales[1]);
  for (int64_t i = 0; i * kDims < head_dim; ++i) {
    store_pairs<sizeof keys->scales>(codes[0] + i * kDims, codes[1] + i * kDims, kDims, row,
                                     reinterpret_cast<uint8_t*>(keys + i), reinterpret_cast<uint8_t*>(values + i));
    keys[i].scales[row] = scales[0][i];
    values[i].scales[row] = scales[1][i];
  }
  for (int64_t i = 0; i * kDims < head_dim; ++i) {
    if (scales[1][i] < kInfinity) continue;
    keys[0].scales[row] = scales[1][i];
    values[i].scales[row] = 0;
  }
}

// The key goes to its column of a panel, the value to its row, with zeros behind it.
void store_floats(const float* key, const float* value, int64_t head_dim, int64_t value_dim, int64_t position, float* keys,
                  float* values) {
  keys += position / kPanelRows * head_dim * kPanelRows + position % kPanelRows;
  for (int64_t d = 0; d < head_dim; ++d) keys[d * kPanelRows] = key[d];
  values += position * value_dim;
  std::memcpy(values, value, size_t(head_dim) * sizeof(float));
  std::memset(values + head_dim, 0, size_t(value_dim - head_dim) * sizeof(float));
}

}  // namespace

std::span<const KvFormat> kv_formats() { return kFormats; }

KvType kv_type_named(const std::string& name) {
  std::string known;
  for (const KvFormat& format : kFormats) {
    if (name == format.name) return format.type;
    known += std::string(known.empty() ? "" : ", ") + format.name;
  }
  throw InputError("kv_type: expected one of " + known + ", got '" + name + "'");
}

int64_t KvCache::value_dim_for(const ModelConfig& config, KvType type) {
  return round_up(config.head_dim, format_of(type).block_values);
}

size_t KvCache::bytes_per_token(const ModelConfig& config, KvType type) {
  return 2 * row_bytes(config, type) * size_t(config.n_kv_heads) * size_t(config.n_layers);
}

size_t KvCache::bytes_for(const ModelConfig& config, int64_t n_positions, KvType type) {
  return size_t(round_up(n_positions, kPanelRows)) * bytes_per_token(config, type);
}

KvCache::KvCache(const ModelConfig& config, int64_t n_positions, KvType type)
    : type_(type),
      n_layers_(config.n_layers),
      head_dim_(config.head_dim),
      value_dim_(value_dim_for(config, type)),
      panel_bytes_(head_bytes_for(config, kPanelRows, type)),
      head_bytes_(head_bytes_for(config, n_positions, type)),
      layer_bytes_(head_bytes_ * size_t(config.n_kv_heads)) {
  keys_ = allocate_aligned<uint8_t>(layer_bytes_ * size_t(n_layers_), "the KV cache");
  values_ = allocate_aligned<uint8_t>(layer_bytes_ * size_t(n_layers_), "the KV cache");
}

void KvCache::store(int64_t layer, int64_t kv_head, int64_t position, const float* key, const float* value,
                    const KernelTable& kernels) {
  uint8_t* keys = keys_.get() + offset(layer, kv_head);
  uint8_t* values = values_.get() + offset(layer, kv_head);
  switch (type_) {
    case KvType::kI16: {
      const size_t panel = size_t(position / kPanelRows) * panel_bytes_;
      store_integers(key, value, head_dim_, value_dim_, position % kPanelRows, keys + panel, values + panel, kernels);
      break;
    }
    case KvType::kF32:
      store_floats(key, value, head_dim_, value_dim_, position, reinterpret_cast<float*>(keys),
                   reinterpret_cast<float*>(values));
      break;
    case KvType::kQ8_0: {
      float even[2][kLargestHead];
      std::memcpy(even[0], key, size_t(head_dim_) * sizeof(float));
      std::memcpy(even[1], value, size_t(head_dim_) * sizeof(float));
      spread(even[0]);
      spread(even[1]);
      const size_t panel = size_t(position / kPanelRows) * panel_bytes_;
      store_blocks(even[0], even[1], head_dim_, position % kPanelRows, reinterpret_cast<KvBlock*>(keys + panel),
                   reinterpret_cast<KvBlock*>(values + panel), kernels);
      break;
    }
  }
}

// Fast Walsh-Hadamard transform of the parts whose length is the largest power of two that divides head_dim.
void KvCache::spread(float* head) const {
  if (type_ != KvType::kQ8_0) return;
  const int64_t length = int64_t(1) << std::countr_zero(uint64_t(head_dim_));
  for (int64_t step = 1; step < length; step *= 2) {
    for (int64_t begin = 0; begin < head_dim_; begin += 2 * step) {
      for (int64_t i = begin; i < begin + step; ++i) {
        const float a = head[i], b = head[i + step];
        head[i] = a + b;
        head[i + step] = a - b;
      }
    }
  }
  const float norm = 1.0f / std::sqrt(float(length));
  for (int64_t i = 0; i < head_dim_; ++i) head[i] *= norm;
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
