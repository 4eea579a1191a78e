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

PHI4EDGE_INLINE V::Floats power_of_two(V::Ints n) { return V::as_floats(V::shift_left(V::add(n, V::set1(127)), 23)); }

// out[i] of the i'th sixteen of 256 values: what is mapped from each is joined.
template <class Map, class Join, class JoinEach>
PHI4EDGE_INLINE void join_sixteens(const Map& map, const Join& join, const JoinEach& join_each, int32_t* out) {
  for (int first = 0; first < 16; first += V::kRows) {
    typename V::Ints joined[V::kRows];
    for (int i = 0; i < V::kRows; ++i) {
      const int at = 16 * (first + i);
      joined[i] = map(at);
      for (int more = V::kRows; more < 16; more += V::kRows) joined[i] = join(joined[i], map(at + more));
    }
    V::store_ints(out + first, join_each(joined));
  }
}

// Bits of the largest magnitude of each sixteen; Pairs: of the two sixteens of its 32.
template <bool Pairs>
PHI4EDGE_INLINE void largest_of_sixteens(const float* in, int32_t* out) {
  const auto bits = [&](int at) { return V::magnitude_bits(V::load(in + at)); };
  const auto map = [&](int at) { return Pairs ? V::max(bits(at), bits(at ^ 16)) : bits(at); };
  join_sixteens(map, [](auto a, auto b) { return V::max(a, b); }, [](const auto& each) { return V::max_of_each(each); }, out);
}

// 256 values to codes, with a scale for N of them, 32 or all; scales16 has it for each sixteen.  What is not finite makes the
// scale NaN, and so reaches the logits, where it is noticed.
template <int N>
PHI4EDGE_INLINE void quantize_super_block(const float* in, int8_t* codes, float* scales16, int32_t* shifts, int32_t* neg_sums) {
  alignas(64) int32_t bits[16], largest_bits[16], sums[16];
  alignas(64) float factors[16];
  largest_of_sixteens<false>(in, bits);
  if constexpr (N == 32) {
    largest_of_sixteens<true>(in, largest_bits);
  } else {
    auto all = V::load_ints(bits);
    for (int i = V::kRows; i < 16; i += V::kRows) all = V::max(all, V::load_ints(bits + i));
    const int32_t largest = V::reduce_max(all);
    for (int i = 0; i < 16; i += V::kRows) V::store_ints(largest_bits + i, V::set1(largest));
  }
  for (int i = 0; i < 16; i += V::kRows) {
    const auto of_block = V::load_ints(largest_bits + i);
    const auto largest = V::as_floats(of_block);
    const auto not_finite = V::sub(largest, largest);  // zero or NaN
    V::store(scales16 + i, V::fma(largest, V::set1(1.0f / (127.0f * float(1 << kMaxShift))), not_finite));
    constexpr int32_t kTiny = 0x0da24260;  // 1e-30, whose reciprocal is finite; values far below it become zero
    const auto at_least_tiny = V::max(of_block, V::set1(kTiny));
    // floor(log2(largest / largest of the sixteen)), as far as shifts go
    const auto ratio = V::field(V::sub(at_least_tiny, V::load_ints(bits + i)), 23, 0xff);
    const auto shift = V::max(V::sub(V::set1(kMaxShift), ratio), V::set1(0));
    const auto inverse = V::div(V::set1(127.0f), V::as_floats(at_least_tiny));
    V::store_ints(shifts + i, shift);
    V::store(factors + i, V::mul(inverse, power_of_two(V::sub(V::set1(kMaxShift), shift))));
  }
  join_sixteens(
      [&](int at) {
        const auto code = V::round(V::mul(V::load(in + at), V::set1(factors[at / 16])));
        V::store_codes(codes + at, code);
        return code;
      },
      [](auto a, auto b) { return V::add(a, b); }, [](const auto& each) { return V::sum_of_each(each); }, sums);
  for (int i = 0; i < 16; i += V::kRows) V::store_ints(neg_sums + i, V::sub(V::set1(0), V::load_ints(sums + i)));
}

// The digits of sums, -2^22 < sum < 2^22, of 16 and of 32 columns.  With 128 added to each of them, they are bytes.
PHI4EDGE_INLINE void store_digits(const int32_t* sums16, int8_t* digits) {
  constexpr int32_t kBias = 0x808080;
  for (int i = 0; i < 16; i += V::kRows) {
    const auto biased = V::add(V::load_ints(sums16 + i), V::set1(kBias));
    V::store_codes(digits + i, V::sub(V::template byte<2>(biased), V::set1(0x80)));
    V::store_codes(digits + 16 + i, V::sub(V::template byte<1>(biased), V::set1(0x80)));
    V::store_codes(digits + 32 + i, V::sub(V::template byte<0>(biased), V::set1(0x80)));
  }
  digits += QuantizedActivations::kDigits16;
  uint64_t high = 0, middle = 0, low = 0;  // of eight sums each
  for (int i = 0; i < 8; ++i) {
    const uint32_t biased = uint32_t(sums16[2 * i]) + uint32_t(sums16[2 * i + 1]) + uint32_t(kBias);
    high |= uint64_t(biased >> 16 & 0xff) << (8 * i);
    middle |= uint64_t(biased >> 8 & 0xff) << (8 * i);
    low |= uint64_t(biased & 0xff) << (8 * i);
  }
  const auto store = [&](int digit, uint64_t eight) {
    eight ^= 0x8080808080808080u;
    std::memcpy(digits + 8 * digit, &eight, 8);
  };
  store(0, high), store(1, middle), store(2, low);
}

template <int N>
void quantize(const float* x, int64_t n_columns, int64_t n_tokens, const QuantizedActivations& out) {
  const int64_t n_super = (n_columns + kSuperBlock - 1) / kSuperBlock;
  for (int64_t sb = 0; sb < n_super; ++sb) {
    const int64_t at = sb * n_tokens, n_left = n_columns - sb * kSuperBlock;
    alignas(64) float padded[kSuperBlock], scales16[16];
    const float* in = x + sb * kSuperBlock;
    if (n_left < kSuperBlock) {  // zeros beyond the last column
      std::memcpy(padded, in, size_t(n_left) * sizeof(float));
      std::memset(padded + n_left, 0, size_t(kSuperBlock - n_left) * sizeof(float));
      in = padded;
    }
    int32_t *shifts = out.shifts + at * 16, *neg_sums = out.neg_sums + at * 16;
    quantize_super_block<N>(in, out.codes + at * kSuperBlock, scales16, shifts, neg_sums);
    alignas(64) float values[16];
    alignas(64) int32_t sums16[16];
    for (int i = 0; i < 16; i += V::kRows) {  // floats hold them
      const auto sum = V::mul(V::to_float(V::load_ints(neg_sums + i)), power_of_two(V::load_ints(shifts + i)));
      V::store_ints(sums16 + i, V::round(sum));
      V::store(values + i, sum);
    }
    if constexpr (N == kSuperBlock) {
      out.scales[at] = scales16[0];
      store_digits(sums16, out.sum_digits + at * out.kDigits);
    } else {
      for (int i = 0; i < 8; ++i) {
        out.scales[at * 8 + i] = scales16[2 * i];
        out.neg_sums32[at * 8 + i] = (values[2 * i] + values[2 * i + 1]) * scales16[2 * i];
      }
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
