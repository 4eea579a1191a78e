// Products for few tokens: weights are unpacked in registers and used at once; bound by memory.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

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
    if (ahead) prefetch(ahead + j * L::kLineBytes32, L::kLineBytes32);
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
  if (ahead) prefetch(ahead + quad * kBytes, kBytes);
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
  // With one token whole lines are used as fast as they come, and to fetch more would stand in the way of what comes next.
  constexpr bool kStreams = T == 1 && kParts == 1;
  constexpr int64_t kAhead = kStreams ? 1024 : 8 * L::kStride;
  const QuantizedActivations& x = L::activations(*task.x);
  const int64_t n_blocks32 = task.n_columns / 32, n_super = (n_blocks32 + 7) / 8, n_tokens = task.x->n_tokens;
  for (int64_t row0 = 0; row0 < task.n_rows; row0 += kPanelRows) {
    const uint8_t* panel = task.panels + size_t(row0 / kPanelRows) * task.panel_bytes;
    alignas(64) float result[T][kPanelRows] = {};
    for (int64_t sb = 0; sb < n_super; ++sb) {
      const int m = int(n_blocks32 - sb * 8 < 8 ? n_blocks32 - sb * 8 : 8);
      const uint8_t *scales = panel + sb * L::kStride, *lines = L::codes(scales, m);
      if (!kStreams) prefetch(scales + kAhead, lines - scales);
      for (int part = 0; part < kParts; ++part) {
        const int row = part * V::kRows;
        add_blocks<F, T>(scales, lines + 4 * row, part == 0 ? lines + kAhead : nullptr, row, m, x, sb * n_tokens + first_token,
                         result);
      }
    }
    for (int t = 0; t < T; ++t) {
      store_rows(task.out + (first_token + t) * task.out_stride + row0, result[t], task.n_rows - row0, task);
    }
  }
}

}  // namespace
}  // namespace phi4edge
