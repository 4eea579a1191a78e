// One block of F::kValues finite floats; `weight` (positive) is the importance of each.
// quantize_blocks.cc has the formats with 32 values a block, quantize_super_blocks.cc those with 256.
#pragma once

#include "quant/formats.h"

namespace phi4edge {

template <class F>
void quantize_block(const float* x, const float* weight, typename F::Block& block);

#define X(F)  \
  template <> \
  void quantize_block<F>(const float* x, const float* weight, F::Block& block);
PHI4EDGE_QUANTIZED_FORMATS(X)
#undef X

}  // namespace phi4edge
