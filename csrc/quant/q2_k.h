// Q2_K: 256 values in 16 sub-blocks of 16; half super-scales, four-bit scales s and minimums m for each sub-block.
//   w[i] = scale * s[i / 16] * q[i] - minimum * m[i / 16]
#pragma once

#include <cstring>

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

struct Q2_K {
  static constexpr const char* kName = "Q2_K";
  static constexpr int kTypeId = 10, kValues = 256;
  struct Block {
    uint8_t nibbles[16];  // s low, m high
    uint8_t q[64];        // per 128 values: bits 2 j, 2 j + 1 of byte l are value 32 j + l
    Half scale, minimum;
  };
  static_assert(sizeof(Block) == 84);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) {
      const uint8_t both = block.nibbles[i / 16];
      out[i] = half_to_float(block.scale) * float(both & 15) * float(q[i]) - half_to_float(block.minimum) * float(both >> 4);
    }
  }

  using Codes = Planes<2, 0>;
  static constexpr bool kSigned = false, kHasMin = true;
  static constexpr int kOffsetBits = -1, kSub = 16, kScaleBytes = 4 * kLineBytes + 64;  // nibbles: four lines; 2 x 16 halves
  static void codes(const Block& block, uint8_t* out) {
    for (int part = 0; part < 8; ++part, out += 32) {
      const uint8_t* q = block.q + part / 4 * 32;
      const int shift = part % 4 * 2;
      for (int i = 0; i < 32; ++i) out[i] = q[i] >> shift & 3;
    }
  }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    for (int line = 0; line < 4; ++line) std::memcpy(area + line * kLineBytes + 4 * row, block.nibbles + 4 * line, 4);
    reinterpret_cast<Half*>(area + 4 * kLineBytes)[row] = block.scale;
    reinterpret_cast<Half*>(area + 4 * kLineBytes + 32)[row] = block.minimum;
  }
  static constexpr bool kSignedScales = false;
  template <class V>
  static typename V::Floats super_scale(const uint8_t* area, int row) {
    return V::load_half(area + 4 * kLineBytes + 2 * row);
  }
  template <class V>
  static typename V::Floats super_minimum(const uint8_t* area, int row) {
    return V::load_half(area + 4 * kLineBytes + 32 + 2 * row);
  }
  template <class V, int Line>
  static typename V::Ints scale_bytes(const uint8_t* area, int row) {
    return V::field(V::load_ints(area + Line * kLineBytes + 4 * row), 0, 0x0f0f0f0f);
  }
  template <class V, int Line>
  static typename V::Ints minimum_bytes(const uint8_t* area, int row) {
    return V::field(V::load_ints(area + Line * kLineBytes + 4 * row), 4, 0x0f0f0f0f);
  }
  struct IntegerScales {
    static constexpr bool kSigned = false;
    static constexpr int kLargest = 3 * 15;  // of code times scale
    template <class V>
    static typename V::Ints factor(V::Ints s) {
      return s;
    }
  };
};

}  // namespace phi4edge
