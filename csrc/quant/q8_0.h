// Q8_0: 32 signed bytes and one half scale.  w[i] = scale * q[i]
#pragma once

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

struct Q8_0 {
  static constexpr const char* kName = "Q8_0";
  static constexpr int kTypeId = 8, kValues = 32;
  struct Block {
    Half scale;
    int8_t q[kValues];
  };
  static_assert(sizeof(Block) == 34);

  static void dequantize(const Block& block, float* out) {
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(block.q[i]);
  }

  // ---- panel: codes are the signed bytes; scales are 16 halves a block
  using Codes = Planes<8, 0>;
  static constexpr bool kSigned = true, kHasMin = false;
  static constexpr int kOffsetBits = -1, kSub = 32, kScaleBytes = 32;
  static void codes(const Block& block, uint8_t* out) {
    for (int i = 0; i < kValues; ++i) out[i] = uint8_t(block.q[i]);
  }
  static void pack_scales(const Block& block, int row, uint8_t* area) { reinterpret_cast<Half*>(area)[row] = block.scale; }
  template <class V>
  static void scales(const uint8_t* area, int row, float* scale, float*) {
    V::store(scale, V::load_half(area + 2 * row));
  }
};

}  // namespace phi4edge
