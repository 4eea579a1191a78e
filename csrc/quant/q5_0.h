// Q5_0: 32 five-bit codes and one half scale.  w[i] = scale * (q[i] - 16); low nibbles as Q4_0, bit i of `high` on top.
// Q5_1: also a half minimum.                  w[i] = scale * q[i] + minimum
#pragma once

#include "quant/q4_0.h"

namespace phi4edge {

struct Q5_0 : HalfScales {
  static constexpr const char* kName = "Q5_0";
  static constexpr int kTypeId = 6, kValues = 32;
  struct Block {
    Half scale;
    uint8_t high[4];
    uint8_t q[16];
  };
  static_assert(sizeof(Block) == 22);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(q[i] - 16);
  }

  using Codes = Planes<4, 1>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = 4;
  static void codes(const Block& block, uint8_t* out) { join(block.q, block.high, out); }

  static void join(const uint8_t* q, const uint8_t* high, uint8_t* out) {
    Q4_0::split_nibbles(q, out);
    for (int i = 0; i < kValues; ++i) out[i] = uint8_t(out[i] | (high[i / 8] >> (i % 8) & 1) << 4);
  }
};

struct Q5_1 : HalfScalesAndMinimums {
  static constexpr const char* kName = "Q5_1";
  static constexpr int kTypeId = 7, kValues = 32;
  struct Block {
    Half scale, minimum;
    uint8_t high[4];
    uint8_t q[16];
  };
  static_assert(sizeof(Block) == 24);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(q[i]) + half_to_float(block.minimum);
  }

  using Codes = Planes<4, 1>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) { Q5_0::join(block.q, block.high, out); }
};

}  // namespace phi4edge
