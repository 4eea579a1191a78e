// Products of quantised weights and quantised activations.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

template <class F>
struct Layout {
  using Codes = typename F::Codes;
  static constexpr int kSubs = kSuperBlock / F::kSub;
  static constexpr int kLineBytes32 = Codes::kLines * kLineBytes;                   // codes of 32 columns
  static constexpr int kScaleBytes256 = kSuperBlock / F::kValues * F::kScaleBytes;  // scales of a super-block
  // One scale of the activations for a super-block, or for 32 columns.
  static constexpr bool kOneScale = F::kValues == kSuperBlock;
  static constexpr int kXScales = kOneScale ? 1 : 8;
  static const QuantizedActivations& activations(const Activations& x) {
    return x.quantized[int(kOneScale ? ActivationScale::kFor256 : ActivationScale::kFor32)];
  }
  // Integer scales of so few bits that a code times its scale is a byte: the sum over a super-block is one of integers.
  static constexpr bool kIntegerScales = requires { typename F::IntegerScales; };

  static int64_t header_bytes(int64_t n_columns) {
    return (n_columns / F::kValues * F::kScaleBytes + kLineBytes - 1) / kLineBytes * kLineBytes;
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

template <class C>
PHI4EDGE_INLINE V::Ints dot(V::Ints sum, V::Bytes weights, V::Bytes x) {
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
        const auto x = V::splat4(codes + t * kSuperBlock + g.value * 4);
        for (int r = 0; r < R; ++r) sum[r][t] = dot<C>(sum[r][t], w[r], x);
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
  if (task.adds) {
    for (int64_t row = 0; row < n_rows; ++row) out[row] += task.factor * from[row];
  } else if (n_rows == kPanelRows) {
    std::memcpy(out, from, kPanelRows * sizeof(float));
  } else {
    for (int64_t row = 0; row < n_rows; ++row) out[row] = from[row];
  }
}

// To the second-level cache: the first takes too few lines at a time to keep the memory busy.
template <int Bytes>
PHI4EDGE_INLINE void fetch(const uint8_t* from) {
  for (int i = 0; i < Bytes; i += kLineBytes) __builtin_prefetch(from + i, 0, 2);
}

// Sums over the H'th sixteen columns of a block of 32; `lines` and the rest point at the block.
template <class F, int H, int T>
PHI4EDGE_INLINE void multiply_sixteen(const uint8_t* lines, const int8_t* codes, const int32_t* neg_sums,
                                      V::Ints (&sum)[1][T]) {
  const auto weights = [&](auto g, int) { return operand<F, H*(kGroups / 2) + g.value>(lines); };
  dot_sixteen<StoredCodes<F>, 1, T>(weights, codes + H * 16, neg_sums + H, sum);
}

// result[t] of the rows of one register += the products of a super-block of n_blocks32 * 32 columns
template <class F, int T>
PHI4EDGE_INLINE void add_blocks(const uint8_t* scales, const uint8_t* lines, const uint8_t* ahead, int row, int n_blocks32,
                                const QuantizedActivations& x, int64_t at, float (*result)[kPanelRows]) {
  using L = Layout<F>;
  typename V::Floats total[T];
  for (int t = 0; t < T; ++t) total[t] = V::set1(0.0f);
  for (int j = 0; j < n_blocks32; ++j, lines += L::kLineBytes32, scales += F::kScaleBytes) {
    if (ahead) fetch<L::kLineBytes32>(ahead + j * L::kLineBytes32);
    typename V::Ints low[1][T], high[1][T];
    multiply_sixteen<F, 0, T>(lines, x.codes + at * kSuperBlock + j * 32, x.neg_sums + at * 16 + 2 * j, low);
    multiply_sixteen<F, 1, T>(lines, x.codes + at * kSuperBlock + j * 32, x.neg_sums + at * 16 + 2 * j, high);
    const auto scale = F::template scale<V>(scales, row);
    for (int t = 0; t < T; ++t) {
      const int32_t* shifts = x.shifts + (at + t) * 16 + 2 * j;
      const auto sum = V::add(V::shift_left_by(low[0][t], shifts), V::shift_left_by(high[0][t], shifts + 1));
      total[t] = add_block<F>(total[t], sum, scale, x.scales[(at + t) * 8 + j]);
      if constexpr (F::kHasMin) {
        total[t] = V::fma(V::set1(x.neg_sums32[(at + t) * 8 + j]), F::template minimum<V>(scales, row), total[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) V::store(result[t] + row, V::add(total[t], V::load(result[t] + row)));
}

// What T tokens have of a super-block so far: with integer scales the integers, else the floats.
template <int T>
struct Totals {
  typename V::Floats floats[1][T];
  typename V::Ints integers[T];
};

// Adds the I'th of four sub-blocks, whose scales are the bytes of a lane; pointers are to the first of the four.
template <class F, int T, int I>
PHI4EDGE_INLINE void add_sub_block(const uint8_t* lines, const int8_t* codes, const int32_t* neg_sums, const int32_t* shifts,
                                   V::Ints scale_bytes, Totals<T>& total) {
  using L = Layout<F>;
  constexpr int kColumn = I * F::kSub, kBlock = kColumn / 32, kSixteen = kColumn / 16;
  lines += kBlock * L::kLineBytes32, codes += kBlock * 32, neg_sums += kBlock * 2, shifts += kSixteen;
  typename V::Ints sum[1][T];
  if constexpr (F::kSub == 16) {
    multiply_sixteen<F, kSixteen % 2, T>(lines, codes, neg_sums, sum);
  } else {
    typename V::Ints high[1][T];
    multiply_sixteen<F, 0, T>(lines, codes, neg_sums, sum);
    multiply_sixteen<F, 1, T>(lines, codes, neg_sums, high);
    for (int t = 0; t < T; ++t) {
      sum[0][t] = V::add(V::shift_left_by(sum[0][t], shifts + t * 16), V::shift_left_by(high[0][t], shifts + t * 16 + 1));
    }
  }
  if constexpr (L::kIntegerScales) {
    const auto factor = F::IntegerScales::template factor<V>(V::byte<I>(scale_bytes));
    for (int t = 0; t < T; ++t) {
      const auto scaled = V::shift_left_by(V::multiply16(sum[0][t], factor), shifts + t * 16);
      total.integers[t] = V::add(total.integers[t], scaled);
    }
  } else {
    const auto scale = sub_scale<F, I>(scale_bytes);
    for (int t = 0; t < T; ++t) {
      if constexpr (F::kSub == 16) sum[0][t] = V::shift_left_by(sum[0][t], shifts + t * 16);
      total.floats[0][t] = V::fma(V::to_float(sum[0][t]), scale, total.floats[0][t]);
    }
  }
}

// Adds four sub-blocks of a super-block, whose first one is 4 * quad.
template <class F, int T>
PHI4EDGE_INLINE void add_quad(const uint8_t* lines, const uint8_t* ahead, int quad, V::Ints scale_bytes,
                              const QuantizedActivations& x, int64_t at, Totals<T>& total) {
  constexpr int kColumns = 4 * F::kSub, kBytes = kColumns / 32 * Layout<F>::kLineBytes32;
  lines += quad * kBytes;
  if (ahead) fetch<kBytes>(ahead + quad * kBytes);
  const int8_t* codes = x.codes + at * kSuperBlock + quad * kColumns;
  const int32_t* neg_sums = x.neg_sums + at * 16 + quad * (kColumns / 16);
  const int32_t* shifts = x.shifts + at * 16 + quad * (kColumns / 16);
  add_sub_block<F, T, 0>(lines, codes, neg_sums, shifts, scale_bytes, total);
  add_sub_block<F, T, 1>(lines, codes, neg_sums, shifts, scale_bytes, total);
  add_sub_block<F, T, 2>(lines, codes, neg_sums, shifts, scale_bytes, total);
  add_sub_block<F, T, 3>(lines, codes, neg_sums, shifts, scale_bytes, total);
}

template <class F, int T>
  requires Layout<F>::kOneScale
PHI4EDGE_INLINE void add_blocks(const uint8_t* scales, const uint8_t* lines, const uint8_t* ahead, int row, int,
                                const QuantizedActivations& x, int64_t at, float (*result)[kPanelRows]) {
  using L = Layout<F>;
  constexpr int kQuads = L::kSubs / 4;
  Totals<T> total;
  for (int t = 0; t < T; ++t) total.floats[0][t] = V::set1(0.0f), total.integers[t] = V::set1(0);
  typename V::Ints scale_bytes[kQuads];
  unroll<kQuads>([&](auto quad) { scale_bytes[quad.value] = F::template scale_bytes<V, quad.value>(scales, row); });
  if constexpr (T == 1) {  // the scales stay in registers; with more tokens that code is too long to be fast
    add_quad<F, T>(lines, ahead, 0, scale_bytes[0], x, at, total);
    add_quad<F, T>(lines, ahead, 1, scale_bytes[1], x, at, total);
    if constexpr (kQuads == 4) {
      add_quad<F, T>(lines, ahead, 2, scale_bytes[2], x, at, total);
      add_quad<F, T>(lines, ahead, 3, scale_bytes[3], x, at, total);
    }
  } else {
    for (int quad = 0; quad < kQuads; ++quad) add_quad<F, T>(lines, ahead, quad, scale_bytes[quad], x, at, total);
  }
  const auto scale = super_scale<F>(scales, row);
  for (int t = 0; t < T; ++t) {
    auto& sum = total.floats[0][t];
    sum = V::mul(L::kIntegerScales ? V::to_float(total.integers[t]) : sum, scale);
  }
  if constexpr (F::kHasMin) {
    Minimums<F> minimums;
    minimums.load(scales, row);
    subtract_minimums<F, 1, T>({&minimums}, x.sum_digits + at * x.kDigits, total.floats);
  }
  for (int t = 0; t < T; ++t) {
    V::store(result[t] + row, V::fma(total.floats[0][t], V::set1(x.scales[at + t]), V::load(result[t] + row)));
  }
}

// Few tokens: weights are unpacked in registers and used at once; bound by memory.
template <class F, int T>
void matmul_direct(const MatmulTask& task, int64_t first_token) {
  using L = Layout<F>;
  const QuantizedActivations& x = L::activations(*task.x);
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8, n_tokens = task.x->n_tokens;
  const int64_t header = L::header_bytes(task.n_columns);
  for (int64_t row0 = 0; row0 < task.n_rows; row0 += kPanelRows) {
    const uint8_t* panel = task.panels + size_t(row0 / kPanelRows) * task.panel_bytes;
    alignas(64) float result[T][kPanelRows] = {};
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      const uint8_t* ahead = panel + kPrefetchBytes + sb * (int64_t(task.panel_bytes) / n_super);
      fetch<L::kScaleBytes256>(ahead + 8 * L::kLineBytes32);
      for (int part = 0; part < kParts; ++part) {
        const int row = part * V::kRows;
        add_blocks<F, T>(panel + sb * L::kScaleBytes256, panel + header + sb * 8 * L::kLineBytes32 + 4 * row,
                         part == 0 ? ahead : nullptr, row, m, x, sb * n_tokens + first_token, result);
      }
    }
    for (int t = 0; t < T; ++t) {
      store_rows(task.out + (first_token + t) * task.out_stride + row0, result[t], task.n_rows - row0, task);
    }
  }
}

// One super-block of the rows of one register, unpacked: what the tile kernel reads from the first-level cache.
template <class F>
struct Expanded {
  using L = Layout<F>;
  using Kind = std::conditional_t<L::kIntegerScales, ScaledCodes<F>, StoredCodes<F>>;
  alignas(64) uint8_t codes[kSuperBlock / 4][V::kRows * 4];
  alignas(64) float scale[L::kSubs][V::kRows];  // of the sub-blocks, where they are not in the codes
  alignas(64) float minimum[L::kOneScale ? 1 : L::kSubs][V::kRows];
  alignas(64) float super_scale[V::kRows];
  Minimums<F> minimums;
};
constexpr size_t kMaxExpandedBytes = (kSuperBlock / 4 + 2 * (kSuperBlock / 16) + 6) * V::kRows * 4 + 8 * 64;

template <class F>
void expand(const uint8_t* panel, int64_t header, int64_t super_block, int n_blocks32, int row, Expanded<F>& out) {
  using L = Layout<F>;
  const uint8_t* scales = panel + super_block * L::kScaleBytes256;
  const uint8_t* lines = panel + header + super_block * 8 * L::kLineBytes32 + 4 * row;
  const auto store_codes = [&](int block, const auto& change) {
    unroll<kGroups>([&](auto g) {
      V::store_bytes(out.codes[block * kGroups + g.value], change(g, operand<F, g.value>(lines + block * L::kLineBytes32)));
    });
  };
  if constexpr (!L::kOneScale) {
    for (int j = 0; j < n_blocks32; ++j, scales += F::kScaleBytes) {
      V::store(out.scale[j], F::template scale<V>(scales, row));
      if constexpr (F::kHasMin) V::store(out.minimum[j], F::template minimum<V>(scales, row));
      store_codes(j, [](auto, auto codes) { return codes; });
    }
  } else {
    V::store(out.super_scale, super_scale<F>(scales, row));
    if constexpr (F::kHasMin) out.minimums.load(scales, row);
    unroll<L::kSubs / 4>([&](auto quad) {
      const auto scale_bytes = F::template scale_bytes<V, quad.value>(scales, row);
      typename V::Ints factor[4];
      unroll<4>([&](auto i) {
        if constexpr (L::kIntegerScales) {
          factor[i.value] = F::IntegerScales::template factor<V>(V::byte<i.value>(scale_bytes));
        } else {
          V::store(out.scale[quad.value * 4 + i.value], sub_scale<F, i.value>(scale_bytes));
        }
      });
      constexpr int kBlocks = 4 * F::kSub / 32;
      for (int j = 0; j < kBlocks; ++j) {
        store_codes(quad.value * kBlocks + j, [&](auto g, auto codes) {
          if constexpr (L::kIntegerScales)
            codes = V::multiply_bytes(codes, factor[2 * j + g.value / (kGroups / 2)], F::kOffsetBits);
          if constexpr (L::kIntegerScales && Expanded<F>::Kind::kSigned) codes = V::bias(codes);
          return codes;
        });
      }
    });
  }
}

// R row registers x T tokens over one super-block; adds to out[token * out_stride + r * kRows].
template <class F, int R, int T>
PHI4EDGE_INLINE void matmul_tile(const Expanded<F>* w, const QuantizedActivations& x, int64_t at, int n_blocks32, float* out,
                                 int64_t out_stride) {
  using L = Layout<F>;
  using C = typename Expanded<F>::Kind;
  typename V::Floats total[R][T];
  typename V::Ints sum[R][T];  // of a sub-block; with integer scales of the super-block
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) total[r][t] = V::set1(0.0f), sum[r][t] = V::set1(0);
  }
  const int8_t* codes = x.codes + at * kSuperBlock;
  const int32_t *shifts = x.shifts + at * 16, *neg_sums = x.neg_sums + at * 16;
  for (int j = 0; j < n_blocks32; ++j) {
    unroll<2>([&](auto h) {  // sixteen columns each
      const int sixteen = 2 * j + h.value, first_group = sixteen * (kGroups / 2);
      typename V::Ints part_sum[R][T];
      const auto weights = [&](auto g, int r) { return V::load_bytes(w[r].codes[first_group + g.value]); };
      dot_sixteen<C, R, T>(weights, codes + sixteen * 16, neg_sums + sixteen, part_sum);
      constexpr bool kStarts = !L::kIntegerScales && (F::kSub == 16 || h.value == 0);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) {
          const auto shifted = V::shift_left_by(part_sum[r][t], shifts + t * 16 + sixteen);
          sum[r][t] = kStarts ? shifted : V::add(sum[r][t], shifted);
        }
      }
      if constexpr (!L::kIntegerScales && (F::kSub == 16 || h.value == 1)) {
        const int sub = F::kSub == 16 ? sixteen : j;
        for (int t = 0; t < T; ++t) {
          for (int r = 0; r < R; ++r) {
            const auto scale = V::load(w[r].scale[sub]);
            if constexpr (L::kOneScale) {
              total[r][t] = V::fma(V::to_float(sum[r][t]), scale, total[r][t]);
            } else {
              total[r][t] = add_block<F>(total[r][t], sum[r][t], scale, x.scales[(at + t) * 8 + j]);
              if constexpr (F::kHasMin) {
                total[r][t] = V::fma(V::set1(x.neg_sums32[(at + t) * 8 + j]), V::load(w[r].minimum[j]), total[r][t]);
              }
            }
          }
        }
      }
    });
  }
  if constexpr (L::kOneScale) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) {
        if constexpr (L::kIntegerScales) total[r][t] = V::to_float(sum[r][t]);
        total[r][t] = V::mul(total[r][t], V::load(w[r].super_scale));
      }
    }
    if constexpr (F::kHasMin) {
      const Minimums<F>* minimums[R];
      for (int r = 0; r < R; ++r) minimums[r] = &w[r].minimums;
      subtract_minimums<F, R, T>(minimums, x.sum_digits + at * x.kDigits, total);
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) {
      float* to = out + t * out_stride + r * V::kRows;
      V::store(to,
               L::kOneScale ? V::fma(total[r][t], V::set1(x.scales[at + t]), V::load(to)) : V::add(total[r][t], V::load(to)));
    }
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

constexpr int kTileRows = V::kTileParts * V::kRows;                                // rows of a tile
constexpr int kGroupPanels = kTileRows > kPanelRows ? kTileRows / kPanelRows : 1;  // panels that are computed together
constexpr int kGroupParts = kGroupPanels * kParts;

// Many tokens: a group of panels is unpacked once per super-block, then all tokens run over it.
template <class F>
void matmul_expanded(const MatmulTask& task) {
  using L = Layout<F>;
  const QuantizedActivations& x = L::activations(*task.x);
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8, n_tokens = task.x->n_tokens;
  const int64_t header = L::header_bytes(task.n_columns);
  const int64_t n_panels = (task.n_rows + kPanelRows - 1) / kPanelRows;
  static_assert(sizeof(Expanded<F>) <= kMaxExpandedBytes);
  auto* expanded = static_cast<Expanded<F>*>(task.scratch);
  auto* tile_out = reinterpret_cast<float*>(expanded + kGroupParts);  // [token][kGroupPanels * 16]
  constexpr int kOutStride = kGroupPanels * kPanelRows;
  const int64_t n_tiles = (n_tokens + V::kTileTokens - 1) / V::kTileTokens;
  for (int64_t panel0 = 0; panel0 < n_panels; panel0 += kGroupPanels) {
    const int n_group = int(n_panels - panel0 < kGroupPanels ? n_panels - panel0 : kGroupPanels);
    const uint8_t* panel = task.panels + size_t(panel0) * task.panel_bytes;
    std::memset(tile_out, 0, size_t(n_tokens) * kOutStride * sizeof(float));
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      for (int i = 0; i < n_group * kParts; ++i) {
        expand<F>(panel + size_t(i / kParts) * task.panel_bytes, header, sb, m, i % kParts * V::kRows, expanded[i]);
      }
      // The next super-block's lines are fetched a few at a time, spread over the tiles.
      const uint8_t* next = panel + header + (sb + 1) * 8 * L::kLineBytes32;
      const int64_t n_lines = 8 * L::Codes::kLines, per_tile = (n_lines + n_tiles - 1) / n_tiles;
      int64_t line = 0;
      const auto prefetch = [&] {
        for (int64_t i = 0; i < per_tile && line < n_lines; ++i, ++line) {
          for (int p = 0; p < n_group; ++p) __builtin_prefetch(next + size_t(p) * task.panel_bytes + line * kLineBytes);
        }
      };
      for_token_tiles<V::kTileTokens>(n_tokens, [&](auto tile, int64_t first) {
        prefetch();
        const int64_t at = sb * n_tokens + first;
        float* out = tile_out + first * kOutStride;
        int i = 0;
        for (; i + V::kTileParts <= n_group * kParts; i += V::kTileParts) {
          matmul_tile<F, V::kTileParts, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
        }
        for (; i < n_group * kParts; ++i) matmul_tile<F, 1, tile.value>(expanded + i, x, at, m, out + i * V::kRows, kOutStride);
      });
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
      for (int p = 0; p < n_group; ++p) {
        const int64_t row = (panel0 + p) * kPanelRows;
        store_rows(task.out + t * task.out_stride + row, tile_out + t * kOutStride + p * kPanelRows, task.n_rows - row, task);
      }
    }
  }
}

constexpr int64_t kMaxDirectTokens = 2 * V::kDirectTokens;  // up to here unpacking each time is cheaper than expanding

template <class F>
void matmul_quantized(const MatmulTask& task) {
  if (task.x->n_tokens > kMaxDirectTokens) return matmul_expanded<F>(task);
  for_token_tiles<V::kDirectTokens>(task.x->n_tokens,
                                    [&](auto tile, int64_t first) { matmul_direct<F, tile.value>(task, first); });
}

// Scales and minimums of the sub-blocks of one row, for codes as they were expanded.
template <class F>
void row_scales(const Expanded<F>& block, int lane, float* scale, float* minimum) {
  using L = Layout<F>;
  for (int sub = 0; sub < L::kSubs; ++sub) {
    minimum[sub] = F::kHasMin && !L::kOneScale ? block.minimum[L::kOneScale ? 0 : sub][lane] : 0;
    scale[sub] = L::kIntegerScales ? 1.0f : block.scale[sub][lane];
    if constexpr (L::kOneScale) scale[sub] *= block.super_scale[lane];
  }
  if constexpr (L::kOneScale && F::kHasMin) {
    alignas(64) int32_t bytes[V::kRows];
    alignas(64) float super_scale[V::kRows];
    V::store(super_scale, block.minimums.super_scale);
    for (int sub = 0; sub < L::kSubs; ++sub) {
      V::store_ints(bytes, block.minimums.bytes[sub / 4]);
      minimum[sub] = super_scale[lane] * float(bytes[lane] >> (8 * (sub % 4)) & 0xff);
    }
  }
}

template <class F>
void dequantize_panel_row(const uint8_t* panel, int row, int64_t n_columns, float* out) {
  using L = Layout<F>;
  using C = typename Expanded<F>::Kind;
  const int64_t header = L::header_bytes(n_columns), n_blocks32 = n_columns / 32;
  const int part_row = row / V::kRows * V::kRows, lane = row % V::kRows;
  for (int64_t sb = 0; sb * 8 < n_blocks32; ++sb) {
    const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
    Expanded<F> block;
    expand<F>(panel, header, sb, m, part_row, block);
    float scale[L::kSubs], minimum[L::kSubs];
    row_scales(block, lane, scale, minimum);
    for (int i = 0; i < 32 * m; ++i) {
      const uint8_t code = block.codes[i / 4][4 * lane + i % 4];
      const int q = C::kBiasBits >= 0 ? int(code) - (1 << (C::kBiasBits < 0 ? 0 : C::kBiasBits))
                    : C::kSigned      ? int(int8_t(code))
                                      : int(code);
      out[sb * kSuperBlock + i] = scale[i / F::kSub] * float(q) - minimum[i / F::kSub];
    }
  }
}

}  // namespace
}  // namespace phi4edge
