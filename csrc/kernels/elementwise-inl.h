// Exponential, SiLU, halves, and the quantisation of activations.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

// e^x for x <= 88; relative error below 2e-7; zero far below.  Range reduction by powers of two, then a polynomial of degree 6.
PHI4EDGE_INLINE V::Floats exp(V::Floats x) {
  x = V::max(V::set1(-87.0f), x);  // in this order a NaN stays one
  const auto n = V::round(V::mul(x, V::set1(1.44269504f)));
  const auto nf = V::to_float(n);
  auto r = V::fma(nf, V::set1(-0.693359375f), x);
  r = V::fma(nf, V::set1(2.12194440e-4f), r);
  auto p = V::set1(1.0f / 720);
  p = V::fma(p, r, V::set1(1.0f / 120));
  p = V::fma(p, r, V::set1(1.0f / 24));
  p = V::fma(p, r, V::set1(1.0f / 6));
  p = V::fma(p, r, V::set1(0.5f));
  p = V::fma(p, r, V::set1(1.0f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::as_floats(V::add(V::as_ints(p), V::shift_left(n, 23)));
}

// x / (1 + e^-x) * up, with -x held below the overflow of exp().
PHI4EDGE_INLINE V::Floats silu_times(V::Floats x, V::Floats up) {
  const auto zero = V::set1(0.0f);
  const auto minus = V::sub(zero, V::max(x, V::set1(-87.0f)));
  return V::mul(V::div(x, V::add(V::set1(1.0f), exp(minus))), up);
}

void silu_multiply(const float* gate, const float* up, int64_t n_values, float* out) {
  int64_t i = 0;
  for (; i + V::kRows <= n_values; i += V::kRows) V::store(out + i, silu_times(V::load(gate + i), V::load(up + i)));
  if (i == n_values) return;
  alignas(64) float tail[2][V::kRows] = {};
  for (int64_t j = i; j < n_values; ++j) tail[0][j - i] = gate[j], tail[1][j - i] = up[j];
  V::store(tail[0], silu_times(V::load(tail[0]), V::load(tail[1])));
  for (int64_t j = i; j < n_values; ++j) out[j] = tail[0][j - i];
}

void to_half(const float* x, int64_t n_values, uint16_t* out) {
  int64_t i = 0;
  for (; i + V::kRows <= n_values; i += V::kRows) V::store_half(out + i, V::load(x + i));
  for (; i < n_values; ++i) {
    alignas(64) float lanes[V::kRows] = {x[i]};
    alignas(64) uint16_t halves[V::kRows];
    V::store_half(halves, V::load(lanes));
    out[i] = halves[0];
  }
}

// The bits of the largest magnitude of 16 values.  Magnitudes are in the order of their bits, and infinities and NaN, which
// comparisons of floats would lose, come last.
PHI4EDGE_INLINE int32_t largest16(const float* in) {
  auto largest = V::set1(0);
  for (int i = 0; i < 16; i += V::kRows) largest = V::max(largest, V::magnitude_bits(V::load(in + i)));
  return V::reduce_max(largest);
}

// 32 values to codes and the half nearest to their scale.  What is not finite, or so large (8e6) that the scale is no half,
// makes the scale NaN, and so reaches the logits, where it is noticed; what is so small that the scale is zero becomes zero.
PHI4EDGE_INLINE void to_q8_block(const float* in, int8_t* codes, uint16_t& scale) {
  constexpr uint16_t kInfinity = 0x7c00, kNan = 0x7e00;
  const int32_t low = largest16(in), high = largest16(in + 16), bits = low > high ? low : high;
  float largest;
  std::memcpy(&largest, &bits, 4);
  alignas(64) float lanes[V::kRows] = {largest / 127.0f};
  alignas(64) uint16_t halves[V::kRows];
  V::store_half(halves, V::load(lanes));
  scale = halves[0] < kInfinity ? halves[0] : kNan;
  if (scale == 0 || scale == kNan) {
    std::memset(codes, 0, KvBlock::kDims);
    return;
  }
  const auto inverse = V::set1(127.0f / largest);
  for (int i = 0; i < KvBlock::kDims; i += V::kRows) V::store_codes(codes + i, V::round(V::mul(V::load(in + i), inverse)));
}

void to_q8(const float* x, int64_t n_values, int8_t* codes, uint16_t* scales) {
  for (int64_t i = 0; i < n_values; i += KvBlock::kDims, codes += KvBlock::kDims, ++scales) {
    alignas(64) float padded[KvBlock::kDims] = {};
    const float* in = x + i;
    if (n_values - i < KvBlock::kDims) {
      std::memcpy(padded, in, size_t(n_values - i) * sizeof(float));
      in = padded;
    }
    to_q8_block(in, codes, *scales);
  }
}

// 32 values to codes.  What is not finite makes the scale NaN, and so reaches the logits, where it is noticed.
PHI4EDGE_INLINE void quantize32(const float* in, int8_t* codes, float& scale, int32_t* shifts, int32_t* neg_sums,
                                float& neg_sum32) {
  constexpr int32_t kInfinity = 0x7f800000, kNan = 0x7fc00000, kTiny = 0x0da24260;  // kTiny: 1e-30, its reciprocal is finite
  const int32_t bits16[2] = {largest16(in), largest16(in + 16)};
  const int32_t bits32 = bits16[0] > bits16[1] ? bits16[0] : bits16[1];
  if (bits32 < kTiny || bits32 >= kInfinity) {
    const int32_t bits = bits32 < kTiny ? 0 : kNan;
    std::memset(codes, 0, 32);
    std::memcpy(&scale, &bits, 4);
    neg_sum32 = scale;
    shifts[0] = shifts[1] = 0, neg_sums[0] = neg_sums[1] = 0;
    return;
  }
  float max32;
  std::memcpy(&max32, &bits32, 4);
  const float inverse = 127.0f / max32;
  int32_t sum32 = 0;
  for (int half = 0; half < 2; ++half) {
    const int ratio = (bits32 - bits16[half]) >> 23;  // floor(log2(max32 / max16))
    const int e = ratio < 7 ? ratio : 7;
    const auto factor = V::set1(inverse * float(1 << e));
    auto sum = V::set1(0);
    for (int i = 16 * half; i < 16 * half + 16; i += V::kRows) {
      const auto q = V::round(V::mul(V::load(in + i), factor));
      V::store_codes(codes + i, q);
      sum = V::add(sum, q);
    }
    shifts[half] = 7 - e;
    neg_sums[half] = -V::reduce_sum(sum);
    sum32 += neg_sums[half] * (1 << shifts[half]);
  }
  scale = max32 * (1.0f / (127.0f * 128.0f));
  neg_sum32 = float(sum32) * scale;
}

void quantize(const float* x, int64_t n_columns, int64_t n_tokens, const MutableActivations& out) {
  const int64_t n_super = (n_columns + kSuperBlock - 1) / kSuperBlock;
  for (int64_t sb = 0; sb < n_super; ++sb) {
    const int64_t at = sb * n_tokens;
    for (int j = 0; j < 8; ++j) {
      const int64_t first = sb * kSuperBlock + 32 * j, n_left = n_columns - first;
      alignas(64) float padded[32] = {};
      const float* in = x + first;
      if (n_left < 32) {  // beyond the last column
        if (n_left > 0) std::memcpy(padded, in, size_t(n_left) * sizeof(float));
        in = padded;
      }
      quantize32(in, out.codes + at * kSuperBlock + 32 * j, out.scales[at * 8 + j], out.shifts + at * 16 + 2 * j,
                 out.neg_sums + at * 16 + 2 * j, out.neg_sums32[at * 8 + j]);
    }
  }
}

}  // namespace
}  // namespace phi4edge
