// The quantizers of weights for scalar, with the registers that the compiler's flags give.

#include "kernels/quantize-inl.h"

PHI4EDGE_DEFINE_QUANTIZERS(scalar)
