// Q4_0: 32 nibbles and one half scale.  w[i] = scale * (q[i] - 8);  byte j holds values j (low nibble) and j + 16.
// Q4_1: also a half minimum.            w[i] = scale * q[i] + minimum
#pragma once

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

struct Q4_0 {
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
  static constexpr bool kSigned = false, kHasMin = false;
  static constexpr int kOffsetBits = 3, kSub = 32, kScaleBytes = 32;
  static void codes(const Block& block, uint8_t* out) { split_nibbles(block.q, out); }
  static void pack_scales(const Block& block, int row, uint8_t* area) { reinterpret_cast<Half*>(area)[row] = block.scale; }
  template <class V>
  static void scales(const uint8_t* area, int row, float* scale, float*) {
    V::store(scale, V::load_half(area + 2 * row));
  }

  static void split_nibbles(const uint8_t* q, uint8_t* out) {
    for (int i = 0; i < 16; ++i) out[i] = q[i] & 15, out[i + 16] = q[i] >> 4;
  }
};

struct Q4_1 {
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
  static constexpr bool kSigned = false, kHasMin = true;
  static constexpr int kOffsetBits = -1, kSub = 32, kScaleBytes = 64;
  static void codes(const Block& block, uint8_t* out) { Q4_0::split_nibbles(block.q, out); }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    reinterpret_cast<Half*>(area)[row] = block.scale;
    reinterpret_cast<Half*>(area)[16 + row] = block.minimum;
  }
  template <class V>
  static void scales(const uint8_t* area, int row, float* scale, float* minimum) {
    V::store(scale, V::load_half(area + 2 * row));
    V::store(minimum, V::sub(V::set1(0.0f), V::load_half(area + 32 + 2 * row)));  // kernels subtract minimums
  }
};

}  // namespace phi4edge
