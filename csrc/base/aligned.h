// Memory aligned to a cache line, or an OutOfMemoryError that says how much was wanted.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

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
AlignedArray<T> allocate_aligned(size_t count, const char* what, size_t alignment = kCacheLine) {
  constexpr size_t kLargest = size_t(1) << 46;
  if (count > kLargest / sizeof(T)) throw OutOfMemoryError(std::string(what) + " would need more than 64 TiB");
  const size_t n_bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
  void* pointer = std::aligned_alloc(alignment, n_bytes ? n_bytes : alignment);
  if (!pointer) {
    throw OutOfMemoryError("no memory for " + std::string(what) + " (" + std::to_string(n_bytes >> 20) + " MiB)",
                           "use a smaller context or a smaller model");
  }
  return AlignedArray<T>(static_cast<T*>(pointer));
}

// The same in large pages where the system has them, which are read faster from end to end.  For what is written as a whole:
// a large page takes all of its memory with its first byte.
template <class T>
AlignedArray<T> allocate_in_large_pages(size_t count, const char* what) {
  constexpr size_t kLargePage = size_t(2) << 20;
  const size_t n_large = count * sizeof(T) / kLargePage;
  AlignedArray<T> array = allocate_aligned<T>(count, what, n_large ? kLargePage : kCacheLine);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (n_large) madvise(array.get(), n_large * kLargePage, MADV_HUGEPAGE);  // what is left at the end has pages of its own
#endif
  return array;
}

}  // namespace phi4edge
