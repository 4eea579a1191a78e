// F32, F16, BF16: one number a value.  Panel: for each column, the numbers of 16 rows side by side.
#pragma once

#include "quant/half.h"

namespace phi4edge {

struct F32 {
  static constexpr const char* kName = "F32";
  static constexpr int kTypeId = 0, kValues = 1;
  using Block = float;
  static void dequantize(const Block& block, float* out) { *out = block; }
  template <class V>
  static auto load(const void* values) {
    return V::load(static_cast<const float*>(values));
  }
};

struct F16 {
  static constexpr const char* kName = "F16";
  static constexpr int kTypeId = 1, kValues = 1;
  using Block = Half;
  static void dequantize(const Block& block, float* out) { *out = half_to_float(block); }
  template <class V>
  static auto load(const void* values) {
    return V::load_half(values);
  }
};

struct BF16 {
  static constexpr const char* kName = "BF16";
  static constexpr int kTypeId = 30, kValues = 1;
  using Block = BFloat;
  static void dequantize(const Block& block, float* out) { *out = bfloat_to_float(block); }
  template <class V>
  static auto load(const void* values) {
    return V::as_floats(V::shift_left(V::load_u16(values), 16));
  }
};

}  // namespace phi4edge
