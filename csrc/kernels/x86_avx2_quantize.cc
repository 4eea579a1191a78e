// The quantizers of weights for AVX2.

namespace phi4edge {
namespace {

constexpr int kRegisterLanes = 8;  // floats

}  // namespace
}  // namespace phi4edge

#include "kernels/quantize-inl.h"

PHI4EDGE_DEFINE_QUANTIZERS(x86_avx2)
