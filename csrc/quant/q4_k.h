// Q4_K: 256 values in 8 sub-blocks of 32; half super-scales, six-bit scales s and minimums m for each sub-block.
//   w[i] = scale * s[j] * q[i] - minimum * m[j],  j = i / 32
// Q5_K: the same with five-bit codes.
#pragma once

#include <cstring>

#include "quant/half.h"
#include "quant/planes.h"

namespace phi4edge {

// Twelve bytes hold eight pairs (s, m) of six bits.  Pairs 0-3: bytes j and 4 + j, low six bits.  Pairs 4-7: nibbles of byte
// 8 + j (s low, m high), with their top two bits in the top bits of bytes j and 4 + j.
struct SixBitPairs {
  static void unpack(const uint8_t* bytes, uint8_t* s, uint8_t* m) {
    for (int j = 0; j < 4; ++j) {
      s[j] = bytes[j] & 63, m[j] = bytes[4 + j] & 63;
      s[4 + j] = uint8_t((bytes[8 + j] & 15) | bytes[j] >> 6 << 4);
      m[4 + j] = uint8_t(bytes[8 + j] >> 4 | bytes[4 + j] >> 6 << 4);
    }
  }

  // w[i] = scale * s[j] * q[i] - minimum * m[j],  j = i / 32
  template <class Block>
  static void dequantize(const Block& block, const uint8_t* q, float* out) {
    uint8_t s[8], m[8];
    unpack(block.pairs, s, m);
    for (int i = 0; i < 256; ++i) {
      out[i] = half_to_float(block.scale) * float(s[i / 32]) * float(q[i]) - half_to_float(block.minimum) * float(m[i / 32]);
    }
  }

  // Panel: scale halves, minimum halves, then the twelve bytes of every row as three lines.
  static constexpr bool kHasMin = true;
  static constexpr int kSub = 32, kScaleBytes = 64 + 3 * kLineBytes;
  template <class Block>
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    reinterpret_cast<Half*>(area)[row] = block.scale;
    reinterpret_cast<Half*>(area)[16 + row] = block.minimum;
    for (int line = 0; line < 3; ++line) std::memcpy(area + 64 + line * kLineBytes + 4 * row, block.pairs + 4 * line, 4);
  }
  static constexpr bool kSignedScales = false;
  template <class V>
  static typename V::Floats super_scale(const uint8_t* area, int row) {
    return V::load_half(area + 2 * row);
  }
  template <class V>
  static typename V::Floats super_minimum(const uint8_t* area, int row) {
    return V::load_half(area + 32 + 2 * row);
  }
  template <class V, int Line>
  static typename V::Ints scale_bytes(const uint8_t* area, int row) {
    return six_bits<V, Line, 0>(area, V::load_ints(area + 64 + 4 * row), row);
  }
  template <class V, int Line>
  static typename V::Ints minimum_bytes(const uint8_t* area, int row) {
    return six_bits<V, Line, 4>(area, V::load_ints(area + 128 + 4 * row), row);
  }

 private:
  template <class V, int Line, int NibbleShift>
  static typename V::Ints six_bits(const uint8_t* area, V::Ints bytes, int row) {
    if constexpr (Line == 0) return V::field(bytes, 0, 0x3f3f3f3f);
    const auto low = V::field(V::load_ints(area + 192 + 4 * row), NibbleShift, 0x0f0f0f0f);
    return V::or_(low, V::field(bytes, 2, 0x30303030));
  }
};

struct Q4_K : SixBitPairs {
  static constexpr const char* kName = "Q4_K";
  static constexpr int kTypeId = 12, kValues = 256;
  struct Block {
    Half scale, minimum;
    uint8_t pairs[12];
    uint8_t q[128];  // for each 64 values: low nibbles are the first 32, high nibbles the last 32
  };
  static_assert(sizeof(Block) == 144);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    SixBitPairs::dequantize(block, q, out);
  }

  using Codes = Planes<4, 0>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) { split(block.q, out); }

  static void split(const uint8_t* q, uint8_t* out) {
    for (int part = 0; part < 4; ++part, q += 32, out += 64) {
      for (int i = 0; i < 32; ++i) out[i] = q[i] & 15;
      for (int i = 0; i < 32; ++i) out[32 + i] = q[i] >> 4;
    }
  }
};

struct Q5_K : SixBitPairs {
  static constexpr const char* kName = "Q5_K";
  static constexpr int kTypeId = 13, kValues = 256;
  struct Block {
    Half scale, minimum;
    uint8_t pairs[12];
    uint8_t high[32];  // bit j of byte l: top bit of value 32 j + l
    uint8_t q[128];
  };
  static_assert(sizeof(Block) == 176);

  static void dequantize(const Block& block, float* out) {
    uint8_t q[kValues];
    codes(block, q);
    SixBitPairs::dequantize(block, q, out);
  }

  using Codes = Planes<4, 1>;
  static constexpr bool kSigned = false;
  static constexpr int kOffsetBits = -1;
  static void codes(const Block& block, uint8_t* out) {
    Q4_K::split(block.q, out);
    for (int part = 0; part < 8; ++part, out += 32) {
      for (int i = 0; i < 32; ++i) out[i] = uint8_t(out[i] | (block.high[i] >> part & 1) << 4);
    }
  }
};

}  // namespace phi4edge
