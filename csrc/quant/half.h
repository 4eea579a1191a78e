// Half (IEEE 754 binary16) and bfloat16 to float and back, in plain C++.
#pragma once

#include <bit>
#include <cstdint>

namespace phi4edge {

using Half = uint16_t;
using BFloat = uint16_t;

inline float half_to_float(Half h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float magnitude = float(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Rounds to nearest, ties to even.
inline Half float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return Half(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return Half(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                             // subnormal: the float adder does the rounding
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return Half(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return Half(sign | (rounded - 0x38000000) >> 13);
}

inline float bfloat_to_float(BFloat b) { return std::bit_cast<float>(uint32_t(b) << 16); }

}  // namespace phi4edge
