// Q5_0: 32 five-bit codes and one half scale.  w[i] = scale * (q[i] - 16); low nibbles as Q4_0, bit i of `high` on top.
// Q5_1: also a half minimum.                  w[i] = scale * q[i] + minimum
#pragma once

#include "quant/q4_0.h"

namespace phi4edge {

struct Q5_0 {
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
  static constexpr bool kSigned = false, kHasMin = false;
  static constexpr int kOffsetBits = 4, kSub = 32, kScaleBytes = 32;
  static void codes(const Block& block, uint8_t* out) { join(block.q, block.high, out); }
  static void pack_scales(const Block& block, int row, uint8_t* area) { reinterpret_cast<Half*>(area)[row] = block.scale; }
  template <class V>
  static void scales(const uint8_t* area, int row, float* scale, float*) {
    V::store(scale, V::load_half(area + 2 * row));
  }

  static void join(const uint8_t* q, const uint8_t* high, uint8_t* out) {
    Q4_0::split_nibbles(q, out);
    for (int i = 0; i < kValues; ++i) out[i] = uint8_t(out[i] | (high[i / 8] >> (i % 8) & 1) << 4);
  }
};

struct Q5_1 {
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
  static constexpr bool kSigned = false, kHasMin = true;
  static constexpr int kOffsetBits = -1, kSub = 32, kScaleBytes = 64;
  static void codes(const Block& block, uint8_t* out) { Q5_0::join(block.q, block.high, out); }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    reinterpret_cast<Half*>(area)[row] = block.scale;
    reinterpret_cast<Half*>(area)[16 + row] = block.minimum;
  }
  template <class V>
  static void scales(const uint8_t* area, int row, float* scale, float* minimum) {
    Q4_1::scales<V>(area, row, scale, minimum);
  }
};

}  // namespace phi4edge
