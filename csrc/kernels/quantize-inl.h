// Floats to the blocks of every quantized format.  Compiled for each instruction set; see fit-inl.h for how the results stay
// the same.  Everything here has internal linkage, as in generic-inl.h.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"
#include "quant/formats.h"
#include "quant/half.h"
#include "quant/iq4.h"

#define PHI4EDGE_INLINE inline __attribute__((always_inline))

// Each builds on the ones before.
// clang-format off
#include "kernels/store_codes-inl.h"
#include "kernels/lanes-inl.h"
#include "kernels/fit-inl.h"
#include "kernels/quantize_blocks-inl.h"
#include "kernels/quantize_super_blocks-inl.h"
// clang-format on

namespace phi4edge {
namespace {

template <class F, class W>
void quantize_blocks(const float* x, W weight, int64_t n_columns, uint8_t* out) {
  for (int64_t i = 0; i < n_columns; i += F::kValues, out += sizeof(typename F::Block)) {
    typename F::Block block;
    quantize_block(x + i, weight + i, block, static_cast<F*>(nullptr));
    std::memcpy(out, &block, sizeof block);
  }
}

template <class F>
void quantize_row(const float* x, const float* weight, int64_t n_columns, uint8_t* out) {
  if (weight) {
    quantize_blocks<F, const float*>(x, weight, n_columns, out);
  } else {
    quantize_blocks<F, Ones>(x, Ones{}, n_columns, out);
  }
}

}  // namespace
}  // namespace phi4edge

// The one symbol of an instruction set's object file.
#define PHI4EDGE_DEFINE_QUANTIZERS(isa)                                                                     \
  namespace phi4edge {                                                                                      \
  extern const QuantizeRow k_quantizers_##isa[kFormatCount];                                                \
  const QuantizeRow k_quantizers_##isa[kFormatCount] = {nullptr, nullptr, nullptr,                          \
                                                        PHI4EDGE_QUANTIZED_FORMATS(PHI4EDGE_QUANTIZER_OF)}; \
  }
#define PHI4EDGE_QUANTIZER_OF(F) quantize_row<F>,
