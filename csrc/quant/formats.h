// The list of weight formats.  To add one: write its header (q8_0.h is the shortest example), and add one line here.
#pragma once

#include "quant/floats.h"
#include "quant/iq4.h"
#include "quant/q2_k.h"
#include "quant/q3_k.h"
#include "quant/q4_0.h"
#include "quant/q4_k.h"
#include "quant/q5_0.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

#define PHI4EDGE_FLOAT_FORMATS(X) X(F32) X(F16) X(BF16)
#define PHI4EDGE_QUANTIZED_FORMATS(X) \
  X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)
#define PHI4EDGE_FORMATS(X) PHI4EDGE_FLOAT_FORMATS(X) PHI4EDGE_QUANTIZED_FORMATS(X)

namespace phi4edge {

enum class FormatIndex : int {
#define X(F) F,
  PHI4EDGE_FORMATS(X)
#undef X
      kCount
};
inline constexpr int kFormatCount = int(FormatIndex::kCount);

}  // namespace phi4edge
