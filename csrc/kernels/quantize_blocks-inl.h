// Floats to blocks of 32 values with one half scale (and perhaps a half minimum).
//
// Part of quantize-inl.h.
#pragma once

namespace phi4edge {
namespace {

// How far the starts of the search reach: the fewer levels, the more it pays to clip the largest values.
template <class F>
struct Search;
template <>
struct Search<Q8_0> {
  using Levels = Integers<-128, 127>;
  static constexpr float kMost = 1.003f, kLeast = 0.975f;
  static constexpr int kStarts = 8, kRefits = 1;
};
template <>
struct Search<Q5_0> {
  using Levels = Integers<-16, 15>;
  static constexpr float kMost = 1.03f, kLeast = 0.78f;
  static constexpr int kStarts = 16, kRefits = 1;
};
template <>
struct Search<Q4_0> {
  using Levels = Integers<-8, 7>;
  static constexpr float kMost = 1.06f, kLeast = 0.62f;
  static constexpr int kStarts = 16, kRefits = 1;
};
template <>
struct Search<IQ4_NL> {
  using Levels = Iq4Levels;
  static constexpr float kMost = 1.06f, kLeast = 0.62f;
  static constexpr int kStarts = 16, kRefits = 1;
};
template <>
struct Search<Q5_1> {
  using Levels = Integers<0, 31>;
  static constexpr float kTrim = 0.03f;
  static constexpr int kRefits = 2;
};
template <>
struct Search<Q4_1> {
  using Levels = Integers<0, 15>;
  static constexpr float kTrim = 0.05f;
  static constexpr int kRefits = 2;
};

template <class F, class W>
void quantize_with_scale(const float* values, W w, typename F::Block& block) {
  using S = Search<F>;
  using Levels = typename S::Levels;
  const Scaled<32> scaled(values);
  ScaleFits<S::kStarts> fits;
  search_scales<S, 32>(scaled.x, w, fits);
  const float best_scale = fits.scale[smallest(fits.error)];
  uint8_t codes[32];
  final_codes<Levels, 32>(scaled.x, scaled.grid.round(best_scale), 0, codes);
  if constexpr (std::is_same_v<F, Q8_0>) {
    for (uint8_t& code : codes) code = uint8_t(code - 128);  // Q8_0 stores signed bytes
  }
  block.scale = scaled.grid.half(best_scale);
  store_codes(codes, block);
}

template <class F, class W>
void quantize_with_minimum(const float* values, W w, typename F::Block& block) {
  using Levels = typename Search<F>::Levels;
  const Scaled<32> scaled(values);
  LineFits fits;
  search_lines<Search<F>, 32, true>(scaled.x, w, sum_of<32>(w), fits);
  scaled.grid.round(fits.scale), scaled.grid.round(fits.offset);
  fits.scale[15] = fits.offset[15] = 0;  // best for values below the least half
  assign<Levels, 32>(scaled.x, w, fits);
  const int k = smallest(fits.error);
  const float scale = fits.scale[k], offset = fits.offset[k];
  uint8_t codes[32];
  final_codes<Levels, 32>(scaled.x, scale, offset, codes);
  block.scale = scaled.grid.half(scale);
  block.minimum = scaled.grid.half(offset);
  store_codes(codes, block);
}

#define X(F, function)                                                            \
  template <class W>                                                              \
  PHI4EDGE_INLINE void quantize_block(const float* x, W w, F::Block& block, F*) { \
    function<F>(x, w, block);                                                     \
  }
X(Q8_0, quantize_with_scale)
X(Q4_0, quantize_with_scale)
X(Q5_0, quantize_with_scale)
X(IQ4_NL, quantize_with_scale)
X(Q4_1, quantize_with_minimum)
X(Q5_1, quantize_with_minimum)
#undef X

}  // namespace
}  // namespace phi4edge
