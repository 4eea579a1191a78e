// The search for a scale (and an offset) of a few values: many candidates at a time, one in each lane.
//
// With the codes q fixed, the best scale is a least-squares fit; with the scale fixed, the best codes are the nearest ones.
// Each round assigns codes and then refits, and never makes the error larger.  Sums are over residuals of the current fit,
// not over the values, so that they keep their digits when the error is small.
//
// Part of quantize-inl.h.  A lane does the same operations in the same order whatever the width of the registers, and nothing
// is fused, so every instruction set gives the same bytes; only the signs of zeros differ on the way.
#pragma once

namespace phi4edge {
namespace {

// The lane with the smallest error, which is not negative; the number of the lane replaces its last bits.
template <int K>
PHI4EDGE_INLINE int smallest(const float (&error)[K]) {
  alignas(64) int32_t keys[K];
  std::memcpy(keys, error, sizeof keys);
  for (int k = 0; k < K; ++k) keys[k] = (keys[k] & 0x7ffffff0) | k;
  int32_t least = keys[0];
  for (int k = 1; k < K; ++k) least = keys[k] < least ? keys[k] : least;
  return least & 15;
}

// ---- x = scale * q

template <int K>
struct ScaleFits {
  alignas(64) float scale[K];
  alignas(64) float error[K], rq[K], qq[K];  // sums of w r r, w r q and w q q, with r = x - scale * q
};

template <class Levels, int N, int K, class W>
PHI4EDGE_INLINE void assign(const float* x, W w, ScaleFits<K>& fits) {
  using T = Floats<K>;
  for (int k = 0; k < K; k += register_lanes(K)) {
    const T scale = load<T>(fits.scale + k), inverse = inverse_of(scale);
    T error{}, rq{}, qq{};
    for (int i = 0; i < N; ++i) {
      const T q = Levels::nearest(x[i] * inverse);
      const T r = x[i] - scale * q, wr = w[i] * r;
      error += wr * r;
      rq += wr * q;
      qq += w[i] * q * q;
    }
    store(error, fits.error + k), store(rq, fits.rq + k), store(qq, fits.qq + k);
  }
}

// Moves to the best scales for the codes, and the errors with them.
template <int K>
PHI4EDGE_INLINE void refit(ScaleFits<K>& fits) {
  using T = Floats<K>;
  for (int k = 0; k < K; k += register_lanes(K)) {
    const T rq = load<T>(fits.rq + k), qq = load<T>(fits.qq + k), error = load<T>(fits.error + k);
    const T step = qq > 1e-30f ? rq / qq : T{}, rest = error - step * rq;
    store(load<T>(fits.scale + k) + step, fits.scale + k);
    store(rest > 0 ? rest : T{}, fits.error + k);
  }
}

// Value k becomes value k + Half where that one weighs more, and so on down to one.
template <int Half>
PHI4EDGE_INLINE void fold(float* value, float* weight) {
  using T = Floats<Half>;
  for (int k = 0; k < Half; k += register_lanes(Half)) {
    const T a = load<T>(weight + k), b = load<T>(weight + k + Half);
    store(b > a ? load<T>(value + k + Half) : load<T>(value + k), value + k);
    store(b > a ? b : a, weight + k);
  }
  if constexpr (Half > 4) {
    fold<Half / 2>(value, weight);
  } else {
    for (int k = 1; k < 4; ++k) {
      value[0] = weight[k] > weight[0] ? value[k] : value[0];
      weight[0] = weight[k] > weight[0] ? weight[k] : weight[0];
    }
  }
}

// The value with the largest weighted square.
template <int N, class W>
PHI4EDGE_INLINE float heaviest_of(const float* x, W w) {
  using T = Floats<N>;
  alignas(64) float value[N], weight[N];
  for (int i = 0; i < N; i += register_lanes(N)) {
    const T x_i = load<T>(x + i);
    store(x_i, value + i), store(load<T>(w + i) * x_i * x_i, weight + i);
  }
  fold<N / 2>(value, weight);
  return value[0];
}

// What to multiply an extreme value with to get a scale: it becomes a level from kMost to kLeast times the highest and the
// lowest one.
template <class S>
struct ScaleStarts {
  static constexpr int K = S::kStarts;
  alignas(64) float all[K], halves[K];  // halves: the range twice, in half as many steps
  constexpr ScaleStarts() : all(), halves() {
    for (int k = 0; k < K; ++k) {
      const float level = k % 2 ? S::Levels::kHighest : S::Levels::kLowest, range = S::kLeast - S::kMost;
      all[k] = 1 / (level * (S::kMost + range * float(k / 2) / (K / 2 - 1)));
      halves[k] = 1 / (level * (S::kMost + range * float(k % (K / 2) / 2) / (K / 4 - 1)));
    }
  }
};
template <class S>
constexpr ScaleStarts<S> kScaleStarts{};

// Several starts, refined: from the value that matters most for the range, which is the largest or the one that weighs most.
template <class S, int N, class W>
PHI4EDGE_INLINE void search_scales(const float* x, W w, ScaleFits<S::kStarts>& fits) {
  constexpr int K = S::kStarts;
  const float largest = heaviest_of<N>(x, Ones{});
  float heaviest = largest;
  if constexpr (!std::is_same_v<W, Ones>) heaviest = heaviest_of<N>(x, w);
  const float* starts = largest == heaviest ? kScaleStarts<S>.all : kScaleStarts<S>.halves;
  for (int k = 0; k < K; ++k) fits.scale[k] = (k < K / 2 ? largest : heaviest) * starts[k];
  for (int round = 0; round < S::kRefits; ++round) {
    assign<typename S::Levels, N>(x, w, fits);
    refit(fits);
  }
}

// ---- x = scale * q + offset

struct LineFits {
  static constexpr int K = 16;
  alignas(64) float scale[K], offset[K];
  // Sums of w r r, w r, w r q, w q and w q q, with r = x - scale * q - offset
  alignas(64) float error[K], r[K], rq[K], q[K], qq[K];
};

template <class Levels, int N, class W>
PHI4EDGE_INLINE void assign(const float* x, W w, LineFits& fits) {
  using T = Floats<16>;
  for (int k = 0; k < 16; k += kRegisterLanes) {
    const T scale = load<T>(fits.scale + k), offset = load<T>(fits.offset + k), inverse = inverse_of(scale);
    T error{}, sum_r{}, rq{}, sum_q{}, qq{};
    for (int i = 0; i < N; ++i) {
      const T above = x[i] - offset, q = Levels::nearest(above * inverse);
      const T r = above - scale * q, wr = w[i] * r, wq = w[i] * q;
      error += wr * r;
      sum_r += wr;
      rq += wr * q;
      sum_q += wq;
      qq += wq * q;
    }
    store(error, fits.error + k), store(sum_r, fits.r + k), store(rq, fits.rq + k);
    store(sum_q, fits.q + k), store(qq, fits.qq + k);
  }
}

// Moves to the best lines for the codes, and the errors with them.  `sum_w` is the sum of all weights.  A format without
// positive offsets gets the best line through zero instead.
template <bool kMayBePositive>
PHI4EDGE_INLINE void refit(float sum_w, LineFits& fits) {
  using T = Floats<16>;
  for (int k = 0; k < 16; k += kRegisterLanes) {
    const T scale = load<T>(fits.scale + k), offset = load<T>(fits.offset + k), r = load<T>(fits.r + k);
    const T rq = load<T>(fits.rq + k), q = load<T>(fits.q + k), qq = load<T>(fits.qq + k), error = load<T>(fits.error + k);
    const T determinant = qq * sum_w - q * q, inverse = 1.0f / determinant;
    T scale_step = (rq * sum_w - r * q) * inverse, offset_step = (r * qq - rq * q) * inverse;
    // One code for all, or an offset that may not be: only one of the two moves freely.
    T other_scale_step{}, other_offset_step{};
    auto is_line = determinant > 1e-6f * qq * sum_w;
    if constexpr (kMayBePositive) {
      other_offset_step = r / sum_w;
    } else {
      is_line &= offset + offset_step <= 0.0f;
      other_offset_step = -offset;
      other_scale_step = qq > 1e-30f ? (rq + offset * q) / qq : T{};
    }
    scale_step = is_line ? scale_step : other_scale_step, offset_step = is_line ? offset_step : other_offset_step;
    const T gain =
        scale_step * (2.0f * rq - qq * scale_step - 2.0f * q * offset_step) + offset_step * (2.0f * r - sum_w * offset_step);
    const T rest = error - gain;
    store(scale + scale_step, fits.scale + k), store(offset + offset_step, fits.offset + k);
    store(rest > 0 ? rest : T{}, fits.error + k);
  }
}

// What to add to the ends of the range of the values, in units of it: 0 to 3 times kTrim off the low end, and off the high
// end 0 to 2 times, or one level left unused (weights that were quantized before often lie on such a grid).
template <class S>
struct LineStarts {
  alignas(64) float low[16], high[16];
  constexpr LineStarts() : low(), high() {
    for (int k = 0; k < 16; ++k) {
      low[k] = S::kTrim * float(k % 4);
      high[k] = k / 4 == 3 ? 1 / (S::Levels::kHighest - 1) : -S::kTrim * float(k / 4);
    }
  }
};
template <class S>
constexpr LineStarts<S> kLineStarts{};

// Sixteen starts, refined.
template <class S, int N, bool kMayBePositive, class W>
PHI4EDGE_INLINE void search_lines(const float* x, W w, float sum_w, LineFits& fits) {
  float low = x[0], high = x[0];
  for (int i = 0; i < N; ++i) low = least(low, x[i]), high = most(high, x[i]);
  if (!kMayBePositive) low = least(low, 0.0f), high = most(high, 0.0f);
  const float range = high - low;
  for (int k = 0; k < 16; ++k) {
    const float from = low + range * kLineStarts<S>.low[k], to = high + range * kLineStarts<S>.high[k];
    fits.offset[k] = kMayBePositive ? from : least(from, 0.0f);
    fits.scale[k] = most(to - fits.offset[k], 0.0f) * (1 / S::Levels::kHighest);
  }
  for (int round = 0; round < S::kRefits; ++round) {
    assign<typename S::Levels, N>(x, w, fits);
    refit<kMayBePositive>(sum_w, fits);
  }
}

template <int N>
PHI4EDGE_INLINE float most_of(const float (&x)[N]) {
  float best = x[0];
  for (int i = 1; i < N; ++i) best = most(best, x[i]);
  return best;
}
template <int N, class W>
PHI4EDGE_INLINE float sum_of(W w) {
  float sum = 0;
  for (int i = 0; i < N; ++i) sum += w[i];
  return sum;
}

// The codes of a final fit, as the file counts them (from 0).
template <class Levels, int N>
PHI4EDGE_INLINE void final_codes(const float* x, float scale, float offset, uint8_t* codes) {
  using T = Floats<N>;
  const float inverse = inverse_of(scale);
  alignas(64) float levels[N];
  for (int i = 0; i < N; i += register_lanes(N)) store(Levels::nearest((load<T>(x + i) - offset) * inverse), levels + i);
  for (int i = 0; i < N; ++i) codes[i] = Levels::index(levels[i]);
}

}  // namespace
}  // namespace phi4edge
