// The search for a scale (and an offset) of a few values: four candidates at a time, one in each lane.
//
// With the codes q fixed, the best scale is a least-squares fit; with the scale fixed, the best codes are the nearest ones.
// Each round assigns codes and then refits, and never makes the error larger.  Sums are over residuals of the current fit,
// not over the values, so that they keep their digits when the error is small.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant/half.h"
#include "quant/iq4.h"

namespace phi4edge {

// GCC's and Clang's portable vectors: SSE on x86, NEON on Arm.
using Four = float __attribute__((vector_size(16)));
using FourInts = int32_t __attribute__((vector_size(16)));
inline Four load_four(const float* from) { return Four{from[0], from[1], from[2], from[3]}; }
inline void store_four(Four values, float* to) { std::memcpy(to, &values, sizeof values); }

inline constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer

inline Four clamp(Four y, float low, float high) {
  const Four lowest = Four{} + low, highest = Four{} + high;
  y = y < lowest ? lowest : y;
  return y > highest ? highest : y;
}

// Levels a code stands for: the integers Lo..Hi.
template <int Lo, int Hi>
struct Integers {
  static constexpr float kLowest = float(Lo), kHighest = float(Hi);
  static Four nearest(Four y) { return (clamp(y, kLowest, kHighest) + kRound) - kRound; }
  static int index(float level) { return int(level) - Lo; }
};

// The nearest entry of the table of IQ4_NL.  Borders between entries are multiples of 1/2, so the floor of 2 y is enough.
struct NearestIq4 {
  float level[481] = {};  // for y = -127 + half / 2
  constexpr NearestIq4() {
    for (int half = 0, i = 0; half <= 480; ++half) {
      while (i < 15 && half - 254 >= kIq4Table[i] + kIq4Table[i + 1]) ++i;
      level[half] = float(kIq4Table[i]);
    }
  }
};
inline constexpr NearestIq4 kNearestIq4{};

struct Iq4Levels {
  static constexpr float kLowest = -127, kHighest = 113;
  static Four nearest(Four y) {
    const FourInts at = __builtin_convertvector(2 * (clamp(y, kLowest, kHighest) - kLowest), FourInts);
    const float* level = kNearestIq4.level;
    return Four{level[at[0]], level[at[1]], level[at[2]], level[at[3]]};
  }
  static int index(float level) {
    int i = 0;
    while (i < 15 && float(kIq4Table[i]) < level) ++i;
    return i;
  }
};

// Blocks are scaled by a power of two, to a largest magnitude in 1..2; the halves of the file then lie on this grid.
class HalfGrid {
 public:
  static constexpr float kSmallest = 0x1p-40f;  // smaller blocks are zero in every format
  explicit HalfGrid(float largest) {
    const int exponent = std::clamp(std::ilogb(std::max(largest, kSmallest)), -40, 127);
    to_block_ = std::ldexp(1.0f, -exponent), to_file_ = std::ldexp(1.0f, exponent);
  }
  float to_block(float value) const { return value * to_block_; }
  Half half(float scaled) const { return float_to_half(std::clamp(scaled * to_file_, -65504.0f, 65504.0f)); }
  float round(float scaled) const { return to_block(half_to_float(half(scaled))); }

 private:
  float to_block_, to_file_;
};

inline float inverse_of(float scale) { return std::fabs(scale) < 1e-30f ? 0.0f : 1.0f / scale; }
inline Four inverse_of(Four scale) {
  return Four{inverse_of(scale[0]), inverse_of(scale[1]), inverse_of(scale[2]), inverse_of(scale[3])};
}

// ---- x = scale * q

template <int K>
struct ScaleFits {
  float scale[K];
  float error[K], rq[K], qq[K];  // sums of w r r, w r q and w q q, with r = x - scale * q
};

template <class Levels, int N, int K>
void assign(const float* x, const float* w, ScaleFits<K>& fits) {
  for (int k = 0; k < K; k += 4) {
    const Four scale = load_four(fits.scale + k), inverse = inverse_of(scale);
    Four error{}, rq{}, qq{};
    for (int i = 0; i < N; ++i) {
      const Four q = Levels::nearest(x[i] * inverse);
      const Four r = x[i] - scale * q, wr = w[i] * r;
      error += wr * r;
      rq += wr * q;
      qq += w[i] * q * q;
    }
    store_four(error, fits.error + k), store_four(rq, fits.rq + k), store_four(qq, fits.qq + k);
  }
}

template <int K>
void refit(ScaleFits<K>& fits) {
  for (int k = 0; k < K; ++k) {
    if (fits.qq[k] > 1e-30f) fits.scale[k] += fits.rq[k] / fits.qq[k];
  }
}

template <int K>
int smallest(const float (&error)[K]) {
  return int(std::min_element(error, error + K) - error);
}

// Start scales: the value `extreme` becomes a level from `most` to `least` times the highest and the lowest one.
template <class Levels, int K>
void start_scales(float extreme, float most, float least, ScaleFits<K>& fits) {
  for (int k = 0; k < K; ++k) {
    const float share = most + (least - most) * float(k / 2) / float(K / 2 - 1);
    fits.scale[k] = extreme / (share * (k % 2 ? Levels::kHighest : Levels::kLowest));
  }
}

// The value that matters most for the range: the largest, or the one with the largest weighted square.
template <int N>
float largest_of(const float* x) {
  float best = 0;
  for (int i = 0; i < N; ++i) best = std::fabs(x[i]) > std::fabs(best) ? x[i] : best;
  return best;
}
template <int N>
float heaviest_of(const float* x, const float* w) {
  float best = 0, most = -1;
  for (int i = 0; i < N; ++i) {
    if (w[i] * x[i] * x[i] > most) most = w[i] * x[i] * x[i], best = x[i];
  }
  return best;
}

// Refined scales of several starts.  `visit` gets each batch of fits, whose errors are those before the last refit.
template <class Levels, int N, int K, class Visit>
void search_scales(const float* x, const float* w, float most, float least, int n_rounds, Visit&& visit) {
  const float extremes[2] = {largest_of<N>(x), heaviest_of<N>(x, w)};
  for (int start = 0; start < (extremes[0] == extremes[1] ? 1 : 2); ++start) {
    ScaleFits<K> fits;
    start_scales<Levels>(extremes[start], most, least, fits);
    for (int round = 0; round < n_rounds; ++round) {
      assign<Levels, N>(x, w, fits);
      refit(fits);
    }
    visit(fits);
  }
}

// ---- x = scale * q + offset

template <int K>
struct LineFits {
  float scale[K], offset[K];
  float error[K], r[K], rq[K], q[K], qq[K];  // sums of w r r, w r, w r q, w q and w q q, with r = x - scale * q - offset
};

template <class Levels, int N, int K>
void assign(const float* x, const float* w, LineFits<K>& fits) {
  for (int k = 0; k < K; k += 4) {
    const Four scale = load_four(fits.scale + k), offset = load_four(fits.offset + k), inverse = inverse_of(scale);
    Four error{}, sum_r{}, rq{}, sum_q{}, qq{};
    for (int i = 0; i < N; ++i) {
      const Four above = x[i] - offset, q = Levels::nearest(above * inverse);
      const Four r = above - scale * q, wr = w[i] * r, wq = w[i] * q;
      error += wr * r;
      sum_r += wr;
      rq += wr * q;
      sum_q += wq;
      qq += wq * q;
    }
    store_four(error, fits.error + k), store_four(sum_r, fits.r + k), store_four(rq, fits.rq + k);
    store_four(sum_q, fits.q + k), store_four(qq, fits.qq + k);
  }
}

// `sum_w` is the sum of all weights.  A format without positive offsets gets the best line through zero instead.
template <int K>
void refit(float sum_w, bool may_be_positive, LineFits<K>& fits) {
  for (int k = 0; k < K; ++k) {
    const float determinant = fits.qq[k] * sum_w - fits.q[k] * fits.q[k];
    if (determinant > 1e-6f * fits.qq[k] * sum_w) {
      const float offset = fits.offset[k] + (fits.r[k] * fits.qq[k] - fits.rq[k] * fits.q[k]) / determinant;
      if (may_be_positive || offset <= 0) {
        fits.scale[k] += (fits.rq[k] * sum_w - fits.r[k] * fits.q[k]) / determinant;
        fits.offset[k] = offset;
        continue;
      }
    }
    if (may_be_positive) {  // one code for all: the offset alone
      if (sum_w > 0) fits.offset[k] += fits.r[k] / sum_w;
    } else if (fits.qq[k] > 1e-30f) {
      fits.scale[k] += (fits.rq[k] + fits.offset[k] * fits.q[k]) / fits.qq[k];
      fits.offset[k] = 0;
    }
  }
}

// Sixteen starts, refined: the range of the values with 0 to 3 times `trim` of it off the low end, and off the high end 0 to 2
// times, or with one level left unused (weights that were quantized before often lie on such a grid).
template <class Levels, int N>
void search_lines(const float* x, const float* w, float trim, bool may_be_positive, int n_rounds, LineFits<16>& fits) {
  float low = x[0], high = x[0], sum_w = 0;
  for (int i = 0; i < N; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]), sum_w += w[i];
  if (!may_be_positive) low = std::min(low, 0.0f);
  if (!may_be_positive) high = std::max(high, 0.0f);
  for (int k = 0; k < 16; ++k) {
    const float range = high - low, from = low + range * trim * float(k % 4);
    const float to = k / 4 == 3 ? high + range / (Levels::kHighest - 1) : high - range * trim * float(k / 4);
    fits.offset[k] = may_be_positive ? from : std::min(from, 0.0f);
    fits.scale[k] = std::max(to - from, 0.0f) / Levels::kHighest;
  }
  for (int round = 0; round < n_rounds; ++round) {
    assign<Levels, N>(x, w, fits);
    refit(sum_w, may_be_positive, fits);
  }
}

// The codes of a final fit, as the file counts them (from 0).
template <class Levels, int N>
void final_codes(const float* x, float scale, float offset, uint8_t* codes) {
  const float inverse = inverse_of(scale);
  for (int i = 0; i < N; i += 4) {
    const Four level = Levels::nearest((load_four(x + i) - offset) * inverse);
    for (int lane = 0; lane < 4; ++lane) codes[i + lane] = uint8_t(Levels::index(level[lane]));
  }
}

}  // namespace phi4edge
