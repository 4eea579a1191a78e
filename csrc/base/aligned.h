// Memory aligned to a cache line, or an OutOfMemoryError that says how much was wanted.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "base/error.h"

namespace phi4edge {

inline constexpr size_t kCacheLine = 64;

struct AlignedFree {
  void operator()(void* pointer) const { std::free(pointer); }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], AlignedFree>;

// Uninitialised.  `what` names the purpose in the error.
template <class T>
AlignedArray<T> allocate_aligned(size_t count, const char* what) {
  constexpr size_t kLargest = size_t(1) << 46;
  if (count > kLargest / sizeof(T)) throw OutOfMemoryError(std::string(what) + " would need more than 64 TiB");
  const size_t n_bytes = (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
  void* pointer = std::aligned_alloc(kCacheLine, n_bytes ? n_bytes : kCacheLine);
  if (!pointer) {
    throw OutOfMemoryError("no memory for " + std::string(what) + " (" + std::to_string(n_bytes >> 20) + " MiB)",
                           "use a smaller context or a smaller model");
  }
  return AlignedArray<T>(static_cast<T*>(pointer));
}

}  // namespace phi4edge
