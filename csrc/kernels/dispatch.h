// Which kernel tables there are, and which one to use.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace phi4edge {

// Tables that this build has and this CPU can run, best first; never empty.
std::vector<const KernelTable*> usable_kernels();
// By name; an empty name takes PHI4EDGE_ISA from the environment, or the best.  Throws UnsupportedError with the usable names.
const KernelTable& select_kernels(const std::string& name);

}  // namespace phi4edge
