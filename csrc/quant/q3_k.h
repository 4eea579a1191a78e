// Q3_K: 256 values in 16 sub-blocks of 16; a half super-scale and a six-bit scale s (minus 32) for each.
//   w[i] = scale * (s[i / 16] - 32) * (q[i] - 4)
#pragma once

#include <cstring>

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

struct Q3_K {
  static constexpr const char* kName = "Q3_K";
  static constexpr int kTypeId = 11, kValues = 256;
  struct Block {
    uint8_t high[32];    // bit j of byte l: top bit of value 32 j + l
    uint8_t low[64];     // per 128 values: bits 2 j, 2 j + 1 of byte l are the low bits of value 32 j + l
    uint8_t packed[12];  // s[j]: low four bits in nibble j / 8 of byte j % 8, top two in bits 2 (j / 4) of byte 8 + j % 4
    Half scale;
  };
  static_assert(sizeof(Block) == 110);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) {
      const int j = i / 16;
      const int s = (block.packed[j % 8] >> (j / 8 * 4) & 15) | (block.packed[8 + j % 4] >> (j / 4 * 2) & 3) << 4;
      out[i] = half_to_float(block.scale) * float(s - 32) * float(q[i] - 4);
    }
  }

  using Codes = Planes<2, 1>;
  static constexpr bool kSigned = false, kHasMin = false;
  static constexpr int kOffsetBits = 2, kSub = 16, kScaleBytes = 3 * kLineBytes + 32;  // packed: three lines; scale: 16 halves
  static void codes(const Block& block, uint8_t* out) {
    for (int part = 0; part < 8; ++part, out += 32) {
      const uint8_t* low = block.low + part / 4 * 32;
      const int shift = part % 4 * 2;
      for (int i = 0; i < 32; ++i) out[i] = uint8_t((low[i] >> shift & 3) | (block.high[i] >> part & 1) << 2);
    }
  }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    for (int line = 0; line < 3; ++line) std::memcpy(area + line * kLineBytes + 4 * row, block.packed + 4 * line, 4);
    reinterpret_cast<Half*>(area + 3 * kLineBytes)[row] = block.scale;
  }
  static constexpr bool kSignedScales = false;
  template <class V>
  static typename V::Floats super_scale(const uint8_t* area, int row) {
    return V::sub(V::set1(0.0f), V::load_half(area + 3 * kLineBytes + 2 * row));
  }
  template <class V, int Line>
  static typename V::Ints scale_bytes(const uint8_t* area, int row) {
    const auto low = V::field(V::load_ints(area + Line % 2 * kLineBytes + 4 * row), Line / 2 * 4, 0x0f0f0f0f);
    const auto top = V::field(V::load_ints(area + 2 * kLineBytes + 4 * row), Line * 2, 0x03030303);
    return V::or_(low, V::shift_left(top, 4));
  }
  // (q - 4) * (32 - s) is -128 .. 124; with s - 32 it could be 128.
  struct IntegerScales {
    static constexpr bool kSigned = true;
    static constexpr int kLargest = 128;
    template <class V>
    static typename V::Ints factor(V::Ints s) {
      return V::field(V::sub(V::set1(32), s), 0, 0xffff);
    }
  };
};

}  // namespace phi4edge
