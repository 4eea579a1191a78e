// IQ4_NL: 32 nibbles that index a fixed table of 16 signed bytes, and one half scale.  w[i] = scale * table[q[i]]
// IQ4_XS: 256 values; one half scale and a six-bit scale (minus 32) for each 32.  w[i] = scale * (s[i / 32] - 32) * table[q[i]]
#pragma once

#include "quant/q4_0.h"

namespace phi4edge {

// The table is part of the file format (denser near zero).
inline constexpr int8_t kIq4Table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL : HalfScales {
  static constexpr const char* kName = "IQ4_NL";
  static constexpr int kTypeId = 20, kValues = 32;
  struct Block {
    Half scale;
    uint8_t q[16];
  };
  static_assert(sizeof(Block) == 18);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) out[i] = half_to_float(block.scale) * float(kIq4Table[q[i]]);
  }

  using Codes = Planes<4, 0>;
  static constexpr const int8_t* kTable = kIq4Table;
  static constexpr bool kSigned = true;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) { Q4_0::split_nibbles(block.q, out); }
};

struct IQ4_XS {
  static constexpr const char* kName = "IQ4_XS";
  static constexpr int kTypeId = 23, kValues = 256;
  struct Block {
    Half scale;
    uint16_t high;   // bits 2 j, 2 j + 1: top of s[j]
    uint8_t low[4];  // nibbles: low four bits of s[j]
    uint8_t q[128];
  };
  static_assert(sizeof(Block) == 136);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    for (int i = 0; i < kValues; ++i) {
      const int j = i / 32, s = (block.low[j / 2] >> (4 * (j % 2)) & 15) | (block.high >> (2 * j) & 3) << 4;
      out[i] = half_to_float(block.scale) * float(s - 32) * float(kIq4Table[q[i]]);
    }
  }

  using Codes = Planes<4, 0>;
  static constexpr const int8_t* kTable = kIq4Table;
  static constexpr bool kSigned = true, kHasMin = false;
  static constexpr int kOffsetBits = -1, kSub = 32, kScaleBytes = 128;  // low: one line; high: 16 x 16 bits; scale: 16 halves
  static void codes(const Block& block, uint8_t* out) {
    for (int j = 0; j < 8; ++j) Q4_0::split_nibbles(block.q + 16 * j, out + 32 * j);
  }
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    for (int b = 0; b < 4; ++b) area[4 * row + b] = block.low[b];
    reinterpret_cast<uint16_t*>(area + 64)[row] = block.high;
    reinterpret_cast<Half*>(area + 96)[row] = block.scale;
  }
  static constexpr bool kSignedScales = true;
  template <class V>
  static typename V::Floats super_scale(const uint8_t* area, int row) {
    return V::mul(V::load_half(area + 96 + 2 * row), V::set1(0.25f));
  }
  // Four times s - 32, which is s with its top bit turned, moved to the top of a signed byte.
  template <class V, int Line>
  static typename V::Ints scale_bytes(const uint8_t* area, int row) {
    const auto nibbles = V::field(V::load_ints(area + 4 * row), 16 * Line, 0xffff);
    const auto pairs = V::field(V::load_u16(area + 64 + 2 * row), 8 * Line, 0xff);
    const auto low = spread<V>(spread<V>(nibbles, 8, 0x00ff00ff), 4, 0x0f0f0f0f);
    const auto high = spread<V>(spread<V>(pairs, 12, 0x000f000f), 6, 0x03030303);
    const auto s = V::or_(low, V::shift_left(high, 4));
    return V::shift_left(V::field(V::add(s, V::set1(0x20202020)), 0, 0x3f3f3f3f), 2);
  }

 private:
  template <class V>
  static typename V::Ints spread(V::Ints bits, int shift, int mask) {
    return V::field(V::or_(bits, V::shift_left(bits, shift)), 0, mask);
  }
};

}  // namespace phi4edge
