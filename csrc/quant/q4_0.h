// Q4_0: 32 nibbles and one half scale.  w[i] = scale * (q[i] - 8);  byte j holds values j (low nibble) and j + 16.
// Q4_1: also a half minimum.            w[i] = scale * q[i] + minimum
#pragma once

#include "quant/planes.h"
#include "quant/scales.h"

namespace phi4edge {

struct Q4_0 : HalfScales {
  static constexpr const char* kName = "Q4_0";
  static constexpr int kTypeId = 2, kValues = 32;
  struct Block {
    Half scale;
    uint8_t q[16];
  };
  static_assert(sizeof(Block) == 18);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(q[i] - 8);
  }

  using Codes = Planes<4, 0>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = 3;
  static void codes(const Block& block, uint8_t* out) { split_nibbles(block.q, out); }

  static void split_nibbles(const uint8_t* q, uint8_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = q[i] & 15, out[i + 16] = q[i] >> 4;
  }
};

struct Q4_1 : HalfScalesAndMinimums {
  static constexpr const char* kName = "Q4_1";
  static constexpr int kTypeId = 3, kValues = 32;
  struct Block {
    Half scale, minimum;
    uint8_t q[16];
  };
  static_assert(sizeof(Block) == 20);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(q[i]) + half_to_float(block.minimum);
  }

  using Codes = Planes<4, 0>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) { Q4_0::split_nibbles(block.q, out); }
};

}  // namespace phi4edge
