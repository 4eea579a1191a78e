// Scales of formats that have a half (and perhaps a half minimum) for each block of 32 values.  Panel: 16 halves a block.
//
// Formats of 256 values have a super-scale, and integers that are multiplied with it, a byte each: scale_bytes<V, Line> gives
// those of four sub-blocks in each lane, minimum_bytes likewise.
#pragma once

#include "quant/half.h"

namespace phi4edge {

struct HalfScales {
  static constexpr bool kHasMin = false;
  static constexpr int kSub = 32, kScaleBytes = 32;

  template <class Block>
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    reinterpret_cast<Half*>(area)[row] = block.scale;
  }
  template <class V>
  static typename V::Floats scale(const uint8_t* area, int row) {
    return V::load_half(area + 2 * row);
  }
};

struct HalfScalesAndMinimums {
  static constexpr bool kHasMin = true;
  static constexpr int kSub = 32, kScaleBytes = 64;

  template <class Block>
  static void pack_scales(const Block& block, int row, uint8_t* area) {
    reinterpret_cast<Half*>(area)[row] = block.scale;
    reinterpret_cast<Half*>(area)[16 + row] = block.minimum;
  }
  template <class V>
  static typename V::Floats scale(const uint8_t* area, int row) {
    return V::load_half(area + 2 * row);
  }
  template <class V>
  static typename V::Floats minimum(const uint8_t* area, int row) {
    return V::sub(V::set1(0.0f), V::load_half(area + 32 + 2 * row));  // kernels subtract minimums
  }
};

}  // namespace phi4edge
