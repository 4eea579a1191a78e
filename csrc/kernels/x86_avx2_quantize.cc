// The quantizers of weights for x86_avx2, with the registers that the compiler's flags give.

#include "kernels/quantize-inl.h"

PHI4EDGE_DEFINE_QUANTIZERS(x86_avx2)
