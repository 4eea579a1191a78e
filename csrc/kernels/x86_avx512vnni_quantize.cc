// The quantizers of weights for AVX-512.

namespace phi4edge {
namespace {

constexpr int kRegisterLanes = 16;  // floats

}  // namespace
}  // namespace phi4edge

#include "kernels/quantize-inl.h"

PHI4EDGE_DEFINE_QUANTIZERS(x86_avx512vnni)
