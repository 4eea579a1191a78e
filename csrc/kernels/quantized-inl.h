// Products of quantised weights and quantised activations: what the kernels for few and for many tokens share.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

template <class F>
struct Layout : PanelLayout<F> {
  using Codes = typename F::Codes;
  static constexpr int kSubs = kSuperBlock / F::kSub;
  // One scale of the activations for a super-block, or for 32 columns.
  static constexpr bool kOneScale = F::kValues == kSuperBlock;
  static const QuantizedActivations& activations(const Activations& x) {
    return x.quantized[int(kOneScale ? ActivationScale::kFor256 : ActivationScale::kFor32)];
  }
  // Integer scales of so few bits that a code times its scale is a byte: the sum over a super-block is one of integers.
  static constexpr bool kIntegerScales = requires { typename F::IntegerScales; };

  // Behind the scales of a super-block of n_blocks32 * 32 columns.
  static const uint8_t* codes(const uint8_t* scales, int n_blocks32) {
    return scales + PanelLayout<F>::scale_bytes(n_blocks32 * 32 / F::kValues);
  }
};

// What is multiplied with the activations: codes as they are stored.
template <class F>
struct StoredCodes {
  static constexpr bool kSigned = F::kSigned;
  // Signed codes meet instructions that want unsigned ones with a bias; others carry an offset of their own.
  static constexpr int kBiasBits = kSigned ? V::kSignedBiasBits : F::kOffsetBits;
  static constexpr int kLargest = (1 << F::Codes::kLines) - 1;  // of unsigned ones
};
// Or their products with integer scales, without any offset.
template <class F>
struct ScaledCodes {
  static constexpr bool kSigned = F::IntegerScales::kSigned;
  static constexpr int kBiasBits = kSigned ? V::kSignedBiasBits : -1;
  static constexpr int kLargest = F::IntegerScales::kLargest;
};

// Formats of 256 values: the integers that the super-scale is multiplied with, as floats.  Signed ones are 2^24 times as large,
// which super_scale() takes back.
template <class F, int I>
PHI4EDGE_INLINE V::Floats sub_scale(V::Ints scale_bytes) {
  if constexpr (F::kSignedScales) {
    return V::to_float(V::top_byte<I>(scale_bytes));
  } else {
    return V::to_float(V::byte<I>(scale_bytes));
  }
}
template <class F>
PHI4EDGE_INLINE V::Floats super_scale(const uint8_t* scales, int row) {
  const auto scale = F::template super_scale<V>(scales, row);
  return F::kSignedScales ? V::mul(scale, V::set1(0x1p-24f)) : scale;
}

// The minimums of a super-block.  What they take away is, over their super-scale, sum of minimum * -(sum of activations); those
// sums are numbers of three digits to the base 256, so that four sub-blocks are one dot product.
template <class F>
struct Minimums {};
template <class F>
  requires(Layout<F>::kOneScale && F::kHasMin)
struct Minimums<F> {
  static constexpr int kSubs = Layout<F>::kSubs;
  typename V::Floats super_scale;
  typename V::Ints bytes[kSubs / 4];

  PHI4EDGE_INLINE void load(const uint8_t* scales, int row) {
    super_scale = F::template super_minimum<V>(scales, row);
    unroll<kSubs / 4>([&](auto line) { bytes[line.value] = F::template minimum_bytes<V, line.value>(scales, row); });
  }
};

// R registers of rows x T tokens: total[r][t] -= what the minimums take away.  Step by step for all, since the steps of one
// wait for each other.
template <class F, int R, int T>
PHI4EDGE_INLINE void subtract_minimums(const Minimums<F>* const (&minimums)[R], const int8_t* digits,
                                       V::Floats (&total)[R][T]) {
  constexpr int kSubs = Layout<F>::kSubs;
  if constexpr (kSubs == 8) digits += QuantizedActivations::kDigits16;
  typename V::Ints sum[R][T];
  for (int digit = 0; digit < 3; ++digit) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) sum[r][t] = digit == 0 ? V::set1(0) : V::shift_left(sum[r][t], 8);
    }
    for (int line = 0; line < kSubs / 4; ++line) {
      for (int t = 0; t < T; ++t) {
        const auto x = V::splat4(digits + t * QuantizedActivations::kDigits + digit * kSubs + 4 * line);
        for (int r = 0; r < R; ++r) sum[r][t] = V::dot(sum[r][t], V::as_bytes(minimums[r]->bytes[line]), x);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) total[r][t] = V::fma(V::to_float(sum[r][t]), minimums[r]->super_scale, total[r][t]);
  }
}

// One operand of dot().
template <class F, int G>
PHI4EDGE_INLINE V::Bytes operand(const uint8_t* lines) {
  auto codes = F::Codes::template group<V, G>(lines);
  if constexpr (requires { F::kTable; }) codes = V::lookup(codes, F::kTable);
  if constexpr (F::kSigned) codes = V::bias(codes);
  return codes;
}

// x: four codes in all lanes, or where they are.
template <class C, class X>
PHI4EDGE_INLINE V::Ints dot(V::Ints sum, V::Bytes weights, X x) {
  if constexpr (C::kSigned) {
    return V::dot_signed(sum, weights, x);
  } else {
    return V::dot(sum, weights, x);
  }
}

// What takes the codes' offset back: -offset * sum of 16 activation codes.
template <class C>
PHI4EDGE_INLINE V::Ints start_value(int32_t neg_sum) {
  if constexpr (C::kBiasBits < 0) {
    return V::set1(0);
  } else {
    return V::shift_left(V::set1(neg_sum), C::kBiasBits);
  }
}

// Sums of products over sixteen columns, of R registers of rows and T tokens.  weights(g, r) gives an operand; codes and
// neg_sums point at the sixteen of the first token.  U is V, as a parameter, so that a V without pairs need not have their
// operations.
template <class C, int R, int T, class Weights, class U = V>
PHI4EDGE_INLINE void dot_sixteen(const Weights& weights, const int8_t* codes, const int32_t* neg_sums, V::Ints (&sum)[R][T]) {
  constexpr int kSteps = kGroups / 2;
  // Where the instruction makes sums of two products in 16 bits, as many of those are added up as 16 bits surely hold.
  constexpr int kPairSteps = !V::kMakesPairs || C::kSigned ? 1 : C::kLargest <= 31 ? 4 : C::kLargest <= 63 ? 2 : 1;
  static_assert(C::kSigned || kPairSteps * C::kLargest * 2 * 127 <= INT16_MAX);
  for (int t = 0; t < T; ++t) {
    const auto start = start_value<C>(neg_sums[t * 16]);
    for (int r = 0; r < R; ++r) sum[r][t] = start;
  }
  if constexpr (kPairSteps == 1) {
    unroll<kSteps>([&](auto g) {
      typename V::Bytes w[R];
      for (int r = 0; r < R; ++r) w[r] = weights(g, r);
      for (int t = 0; t < T; ++t) {
        const int8_t* at = codes + t * kSuperBlock + g.value * 4;
        if constexpr (R == 1) {
          sum[0][t] = dot<C>(sum[0][t], w[0], at);
        } else {
          const auto x = V::splat4(at);
          for (int r = 0; r < R; ++r) sum[r][t] = dot<C>(sum[r][t], w[r], x);
        }
      }
    });
  } else {
    typename V::Ints pairs[R][T];
    unroll<kSteps>([&](auto g) {
      typename V::Bytes w[R];
      for (int r = 0; r < R; ++r) w[r] = weights(g, r);
      for (int t = 0; t < T; ++t) {
        const auto x = V::splat4(codes + t * kSuperBlock + g.value * 4);
        for (int r = 0; r < R; ++r) {
          const auto products = U::multiply_pairs(w[r], x);
          pairs[r][t] = g.value % kPairSteps == 0 ? products : U::add_pairs(pairs[r][t], products);
          if constexpr (g.value % kPairSteps == kPairSteps - 1) sum[r][t] = V::add(sum[r][t], U::sum_pairs(pairs[r][t]));
        }
      }
    });
  }
}

// The order of the operations below is that of every kernel, so a token's result does not depend on how many tokens are
// computed together.

// Blocks of 32 values: total + sum of products * scales - minimum * sum of activations
template <class F>
PHI4EDGE_INLINE V::Floats add_block(V::Floats total, V::Ints sum, V::Floats scale, float x_scale) {
  return V::fma(V::mul(V::to_float(sum), V::set1(x_scale)), scale, total);
}

PHI4EDGE_INLINE void store_rows(float* out, const float* from, int64_t n_rows, const MatmulTask& task) {
  if (n_rows > kPanelRows) n_rows = kPanelRows;
  if (task.adds && n_rows == kPanelRows) {
    for (int row = 0; row < kPanelRows; row += V::kRows) {
      V::store(out + row, V::fma(V::set1(task.factor), V::load(from + row), V::load(out + row)));
    }
  } else if (task.adds) {
    for (int64_t row = 0; row < n_rows; ++row) out[row] += task.factor * from[row];
  } else if (n_rows == kPanelRows) {
    std::memcpy(out, from, kPanelRows * sizeof(float));
  } else {
    for (int64_t row = 0; row < n_rows; ++row) out[row] = from[row];
  }
}

// Calls body.template operator()<T>(first) so that tiles of at most Max tokens cover n tokens.
template <int Max, class Body>
PHI4EDGE_INLINE void for_token_tiles(int64_t n, Body&& body) {
  int64_t first = 0;
  for (; first + Max <= n; first += Max) body(Index<Max>{}, first);
  unroll<Max - 1>([&](auto i) {
    if (n - first == i.value + 1) body(Index<i.value + 1>{}, first);
  });
}

}  // namespace
}  // namespace phi4edge
