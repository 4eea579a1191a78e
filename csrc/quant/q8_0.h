// Q8_0: 32 signed bytes and one half scale.  w[i] = scale * q[i]
#pragma once

#include "quant/planes.h"
#include "quant/scales.h"

namespace phi4edge {

struct Q8_0 : HalfScales {
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
  static constexpr bool kSigned = true;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) {
    for (int i = 0; i < kValues; ++i) out[i] = uint8_t(block.q[i]);
  }
};

}  // namespace phi4edge
