// The quantizers of weights for any CPU: four lanes are SSE on x86 and NEON on Arm.

namespace phi4edge {
namespace {

constexpr int kRegisterLanes = 4;  // floats

}  // namespace
}  // namespace phi4edge

#include "kernels/quantize-inl.h"

PHI4EDGE_DEFINE_QUANTIZERS(scalar)
