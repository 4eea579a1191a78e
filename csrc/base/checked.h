// Arithmetic on numbers that came from a file: nothing when the result does not fit.
#pragma once

#include <cstdint>
#include <optional>

namespace phi4edge {

inline std::optional<uint64_t> checked_add(uint64_t a, uint64_t b) {
  uint64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? std::nullopt : std::optional(sum);
}

// Rounded up to a multiple of alignment, a power of two.
inline std::optional<uint64_t> checked_align(uint64_t n, uint64_t alignment) {
  const auto sum = checked_add(n, alignment - 1);
  return sum ? std::optional(*sum & ~(alignment - 1)) : std::nullopt;
}

}  // namespace phi4edge
