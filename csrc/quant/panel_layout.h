// Where scales and codes lie in a panel of a quantised format.
#pragma once

#include <cstdint>

#include "quant/format.h"
#include "quant/planes.h"

namespace phi4edge {

// Super-blocks come one after the other, scales first, each part in whole lines: a product of few tokens reads one stream.
// From two places, or not in order, a thread gets two thirds of the bytes per second.
template <class F>
struct PanelLayout {
  static constexpr int64_t kBlocks = kSuperBlock / F::kValues;            // of a super-block
  static constexpr int64_t kLineBytes32 = F::Codes::kLines * kLineBytes;  // codes of 32 columns

  static constexpr int64_t scale_bytes(int64_t n_blocks) {
    return (n_blocks * F::kScaleBytes + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
  static constexpr int64_t code_bytes(int64_t n_blocks) { return n_blocks * F::kValues / 32 * kLineBytes32; }
  static constexpr int64_t kStride = scale_bytes(kBlocks) + code_bytes(kBlocks);

  static int64_t n_bytes(int64_t n_columns) {
    const int64_t n_blocks = n_columns / F::kValues, left = n_blocks % kBlocks;
    return n_blocks / kBlocks * kStride + scale_bytes(left) + code_bytes(left);
  }
};

}  // namespace phi4edge
