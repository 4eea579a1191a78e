// Picks the kernel table at run time.  To add an instruction set: one file, one line in CMakeLists.txt, one line here.

#include "kernels/dispatch.h"

#include <cstdlib>

#include "base/error.h"

namespace phi4edge {

#ifdef PHI4EDGE_HAVE_X86_AVX512VNNI
extern const KernelTable k_kernels_x86_avx512vnni;
#endif
#ifdef PHI4EDGE_HAVE_X86_AVX2
extern const KernelTable k_kernels_x86_avx2;
#endif
extern const KernelTable k_kernels_scalar;

std::vector<const KernelTable*> usable_kernels() {
  std::vector<const KernelTable*> usable;
#ifdef PHI4EDGE_HAVE_X86_AVX512VNNI
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    usable.push_back(&k_kernels_x86_avx512vnni);
  }
#endif
#ifdef PHI4EDGE_HAVE_X86_AVX2
  // Every AVX2 CPU with FMA has F16C; the compiler built-in of older compilers does not know that name.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back(&k_kernels_x86_avx2);
#endif
  usable.push_back(&k_kernels_scalar);
  return usable;
}

const KernelTable& select_kernels(const std::string& name) {
  std::string wanted = name;
  const char* variable = std::getenv("PHI4EDGE_ISA");
  if (wanted.empty() && variable) wanted = variable;
  const auto usable = usable_kernels();
  if (wanted.empty()) return *usable.front();
  std::string names;
  for (const KernelTable* table : usable) {
    if (wanted == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw UnsupportedError("instruction set '" + wanted + "' is not available here", "use one of: " + names);
}

}  // namespace phi4edge
