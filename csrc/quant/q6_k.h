// Q6_K: 256 values in 16 sub-blocks of 16; a half super-scale and a signed byte scale s for each.
//   w[i] = scale * s[i / 16] * (q[i] - 32)
#pragma once

#include <cstring>

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

struct Q6_K {
  static constexpr const char* kName = "Q6_K";
  static constexpr int kTypeId = 14, kValues = 256;
  struct Block {
    uint8_t low[128];  // per 128 values: low nibbles are values 0-63, high nibbles 64-127
    uint8_t high[64];  // per 128 values: bits 2 j, 2 j + 1 of byte l are the top of value 32 j + l
    int8_t s[16];
    Half scale;
  };
  static_assert(sizeof(Block) == 210);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(block.s[i / 16]) * float(q[i] - 32);
  }

  using Codes = Planes<4, 2>;
  static constexpr bool kSigned = false, kHasMin = false;
  static constexpr int kOffsetBits = 5, kSub = 16, kScaleBytes = 4 * kLineBytes + 32;  // s: four lines; scale: 16 halves
  static void codes(const Block& block, uint8_t* out) {
    for (int part = 0; part < 8; ++part, out += 32) {
      const uint8_t *low = block.low + part / 4 * 64 + part % 2 * 32, *high = block.high + part / 4 * 32;
      const int low_shift = part % 4 / 2 * 4, high_shift = part % 4 * 2;
      for (int i = 0; i < 32; ++i) out[i] = uint8_t((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4);
    }
  }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    for (int line = 0; line < 4; ++line) std::memcpy(area + line * kLineBytes + 4 * row, block.s + 4 * line, 4);
    reinterpret_cast<Half*>(area + 4 * kLineBytes)[row] = block.scale;
  }
  static constexpr bool kSignedScales = true;
  template <class V>
  static typename V::Floats super_scale(const uint8_t* area, int row) {
    return V::load_half(area + 4 * kLineBytes + 2 * row);
  }
  template <class V, int Line>
  static typename V::Ints scale_bytes(const uint8_t* area, int row) {
    return V::load_ints(area + Line * kLineBytes + 4 * row);
  }
};

}  // namespace phi4edge
