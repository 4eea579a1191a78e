// How fast V::dot can be: the instruction alone, as often as registers allow.
//
// Part of generic-inl.h.
#pragma once

namespace phi4edge {
namespace {

// Enough sums that none waits for itself; with them, codes and a temporary fit the registers of every instruction set.
constexpr int kPeakSums = V::kRows == 1 ? 4 : 12;

// The compiler may not know the value from here on, which stays in its register.
template <class T>
PHI4EDGE_INLINE void forget_value(T& value) {
  if constexpr (requires { value.v; }) {
    auto in_register = value.v;  // of its own: an array that is asked for is kept in memory
#if defined(__x86_64__) || defined(__i386__)
    __asm__ volatile("" : "+v"(in_register));
#else
    __asm__ volatile("" : "+w"(in_register));
#endif
    value.v = in_register;
  } else {
    __asm__ volatile("" : "+r"(value));
  }
}

int64_t repeat_dots(int64_t n_steps) {
  alignas(64) uint8_t codes[4 * V::kRows];  // 63, the largest unsigned one: kMaxPeakSteps of them do not overflow
  std::memset(codes, 63, sizeof codes);
  V::Bytes code = V::load_bytes(codes);
  V::Ints sums[kPeakSums];
  for (auto& sum : sums) sum = V::set1(0);
  for (int64_t step = 0; step < n_steps; ++step) {
    unroll<kPeakSums>([&](auto i) {
      forget_value(code);  // else the products are computed once, before the loop
      sums[i.value] = V::dot(sums[i.value], code, code);
      forget_value(sums[i.value]);  // else some compilers keep two copies of each
    });
  }
  return n_steps * kPeakSums * V::kRows * 4 * 2;
}

}  // namespace
}  // namespace phi4edge
