// Exponential, SiLU, and the quantisation of activations, keys and values.
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

// Sums of 256 squares are floats, and their sum is a double.
void rms_norm(float* x, const float* add, const float* weight, int64_t n_values, float epsilon, float* out) {
  constexpr int64_t kChunk = 256;
  double sum = 0;
  for (int64_t begin = 0; begin < n_values; begin += kChunk) {
    const int64_t end = begin + kChunk < n_values ? begin + kChunk : n_values;
    auto squares = V::set1(0.0f);
    int64_t i = begin;
    for (; i + V::kRows <= end; i += V::kRows) {
      auto v = V::load(x + i);
      if (add) {
        v = V::add(v, V::load(add + i));
        V::store(x + i, v);
      }
      squares = V::fma(v, v, squares);
    }
    float tail = 0;
    for (; i < end; ++i) {
      if (add) x[i] += add[i];
      tail += x[i] * x[i];
    }
    sum += double(V::reduce_sum(squares)) + double(tail);
  }
  const float factor = 1.0f / __builtin_sqrtf(float(sum / double(n_values)) + epsilon);
  const auto factors = V::set1(factor);
  int64_t i = 0;
  for (; i + V::kRows <= n_values; i += V::kRows) {
    V::store(out + i, V::mul(V::mul(V::load(x + i), factors), V::load(weight + i)));
  }
  for (; i < n_values; ++i) out[i] = x[i] * factor * weight[i];
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

// N values, 32 or 256, to codes with one scale.  What is not finite makes the scale NaN, and so reaches the logits, where it is
// noticed.
template <int N>
PHI4EDGE_INLINE void quantize_block(const float* in, int8_t* codes, float& scale, int32_t* shifts, int32_t* neg_sums) {
  constexpr int32_t kInfinity = 0x7f800000, kTiny = 0x0da24260;  // kTiny: 1e-30, its reciprocal is finite
  int32_t bits16[N / 16], bits = 0;
  for (int i = 0; i < N / 16; ++i) {
    bits16[i] = largest16(in + 16 * i);
    bits = bits > bits16[i] ? bits : bits16[i];
  }
  if (bits < kTiny || bits >= kInfinity) {
    scale = bits < kTiny ? 0.0f : __builtin_nanf("");
    std::memset(codes, 0, N);
    for (int i = 0; i < N / 16; ++i) shifts[i] = neg_sums[i] = 0;
    return;
  }
  float largest;
  std::memcpy(&largest, &bits, 4);
  const float inverse = 127.0f / largest;
  for (int i = 0; i < N / 16; ++i) {
    const int ratio = (bits - bits16[i]) >> 23;  // floor(log2(largest / largest of the sixteen))
    const int e = ratio < kMaxShift ? ratio : kMaxShift;
    const auto factor = V::set1(inverse * float(1 << e));
    auto sum = V::set1(0);
    for (int at = 16 * i; at < 16 * i + 16; at += V::kRows) {
      const auto q = V::round(V::mul(V::load(in + at), factor));
      V::store_codes(codes + at, q);
      sum = V::add(sum, q);
    }
    shifts[i] = kMaxShift - e;
    neg_sums[i] = -V::reduce_sum(sum);
  }
  scale = largest * (1.0f / (127.0f * float(1 << kMaxShift)));
}

// The digits of n sums, -2^22 < sum < 2^22.
PHI4EDGE_INLINE void store_digits(const int32_t* sums, int n, int8_t* digits) {
  for (int i = 0; i < n; ++i) {
    const int32_t low = int8_t(sums[i]), rest = (sums[i] - low) >> 8, middle = int8_t(rest);
    digits[i] = int8_t((rest - middle) >> 8);
    digits[n + i] = int8_t(middle);
    digits[2 * n + i] = int8_t(low);
  }
}

template <int N>
void quantize(const float* x, int64_t n_columns, int64_t n_tokens, const QuantizedActivations& out) {
  constexpr int kBlocks = kSuperBlock / N;  // each with a scale
  const int64_t n_super = (n_columns + kSuperBlock - 1) / kSuperBlock;
  for (int64_t sb = 0; sb < n_super; ++sb) {
    const int64_t at = sb * n_tokens, n_left = n_columns - sb * kSuperBlock;
    alignas(64) float padded[kSuperBlock];
    const float* in = x + sb * kSuperBlock;
    if (n_left < kSuperBlock) {  // zeros beyond the last column
      std::memcpy(padded, in, size_t(n_left) * sizeof(float));
      std::memset(padded + n_left, 0, size_t(kSuperBlock - n_left) * sizeof(float));
      in = padded;
    }
    int32_t *shifts = out.shifts + at * 16, *neg_sums = out.neg_sums + at * 16;
    for (int i = 0; i < kBlocks; ++i) {
      quantize_block<N>(in + N * i, out.codes + at * kSuperBlock + N * i, out.scales[at * kBlocks + i], shifts + N / 16 * i,
                        neg_sums + N / 16 * i);
    }
    int32_t sums16[16], sums32[8];
    for (int i = 0; i < 16; ++i) sums16[i] = neg_sums[i] * (1 << shifts[i]);
    for (int i = 0; i < 8; ++i) sums32[i] = sums16[2 * i] + sums16[2 * i + 1];
    if constexpr (N == kSuperBlock) {
      store_digits(sums16, 16, out.sum_digits + at * out.kDigits);
      store_digits(sums32, 8, out.sum_digits + at * out.kDigits + out.kDigits16);
    } else {
      for (int i = 0; i < 8; ++i) out.neg_sums32[at * 8 + i] = float(sums32[i]) * out.scales[at * 8 + i];
    }
  }
}

float to_i16(const float* x, int64_t n_values, const I16Limits& limits, int16_t* codes) {
  constexpr int32_t kSmallest = (127 - 110) << 23, kTooLarge = (127 + 126) << 23;  // reciprocals and scales are normal numbers
  const int64_t n_whole = n_values / 16 * 16;
  alignas(64) float rest[16] = {};
  std::memcpy(rest, x + n_whole, size_t(n_values - n_whole) * sizeof(float));
  const auto for_all = [&](auto&& body) {
    for (int64_t i = 0; i < n_values; i += V::kRows) body(i, V::load(i < n_whole ? x + i : rest + (i - n_whole)));
  };
  const size_t n_bytes = size_t(n_values + 15) / 16 * 16 * sizeof(int16_t);
  if (n_values > n_whole) std::memset(codes + n_whole, 0, 16 * sizeof(int16_t));

  auto bits = V::set1(0);
  for_all([&](int64_t, V::Floats v) { bits = V::max(bits, V::magnitude_bits(v)); });
  const int32_t largest_bits = V::reduce_max(bits);
  if (largest_bits < kSmallest || largest_bits >= kTooLarge) {
    std::memset(codes, 0, n_bytes);
    return largest_bits < kSmallest ? 0.0f : __builtin_nanf("");
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  const auto to_one = V::set1(1.0f / largest);  // first, or squares would leave the range of floats
  auto squares = V::set1(0.0f);
  for_all([&](int64_t, V::Floats v) {
    v = V::mul(v, to_one);
    squares = V::fma(v, v, squares);
  });
  const float norm = __builtin_sqrtf(V::reduce_sum(squares));
  const float factor = norm / limits.norm > 1.0f / limits.code ? norm / limits.norm : 1.0f / limits.code;
  const auto to_code = V::set1(1.0f / factor);
  for_all([&](int64_t i, V::Floats v) { V::store_codes(codes + i, V::round(V::mul(V::mul(v, to_one), to_code))); });
  return largest * factor;
}

}  // namespace
}  // namespace phi4edge
