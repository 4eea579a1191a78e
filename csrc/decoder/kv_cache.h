// Keys and values of the tokens seen so far.
//   i16        both    [layer][kv_head][position / 16] of I16Panel; value_dim is head_dim rounded up to 16
//   f32        keys    [layer][kv_head][position / 16][head_dim][16]   a panel of 16 keys is what the attention multiplies
//              values  [layer][kv_head][position][value_dim]           value_dim is head_dim rounded up to 16
//   q8_0       both    [layer][kv_head][position / 16][value_dim / 32] of KvBlock; value_dim is head_dim rounded up to 32;
//              what is stored is spread(key), spread(value)
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/aligned.h"
#include "decoder/config.h"
#include "kernels/kernels.h"

namespace phi4edge {

// One way to store keys and values.  A key, or a value, takes whole blocks, and scale_bytes beside them.
struct KvFormat {
  KvType type;
  const char* name;
  int64_t block_values, block_bytes, scale_bytes;
};

std::span<const KvFormat> kv_formats();
KvType kv_type_named(const std::string& name);  // InputError when there is none

class KvCache {
 public:
  // Memory is reserved at once, and takes real pages only as positions are written.
  KvCache(const ModelConfig& config, int64_t n_positions, KvType type);

  // key and value: head_dim floats; key is already rotated.
  void store(int64_t layer, int64_t kv_head, int64_t position, const float* key, const float* value,
             const KernelTable& kernels);
  // Multiplies a head with the orthonormal matrix that spreads each number evenly over the head, in place, where the type
  // needs it: with 32 numbers to a scale, one that is larger than the others would cost them their digits (Ashkboos et al.,
  // "QuaRot", 2024).  Queries must be spread as keys are, and sums of values be spread back: the matrix is its own inverse.
  void spread(float* head) const;
  // Takes over the first n_positions of a cache of the same model and type, which may have fewer positions.
  void copy(const KvCache& other, int64_t n_positions);
  const void* keys(int64_t layer, int64_t kv_head) const;
  const void* values(int64_t layer, int64_t kv_head) const;

  KvType type() const { return type_; }
  int64_t value_dim() const { return value_dim_; }
  size_t n_bytes() const { return 2 * layer_bytes_ * size_t(n_layers_); }

  static int64_t value_dim_for(const ModelConfig& config, KvType type);
  static size_t bytes_per_token(const ModelConfig& config, KvType type);  // in all layers
  static size_t bytes_for(const ModelConfig& config, int64_t n_positions, KvType type);

 private:
  size_t offset(int64_t layer, int64_t kv_head) const { return layer_bytes_ * size_t(layer) + head_bytes_ * size_t(kv_head); }

  KvType type_;
  int64_t n_layers_, head_dim_, value_dim_;
  size_t panel_bytes_, head_bytes_, layer_bytes_;  // of the keys, or the values, of 16 positions, a head, a layer
  AlignedArray<uint8_t> keys_, values_;
};

}  // namespace phi4edge
