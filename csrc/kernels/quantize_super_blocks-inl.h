// Floats to super-blocks of 256 values: sub-blocks have integer scales (and minimums) in units of a half of the super-block.
//
// First each sub-block is fitted alone.  Then a unit is tried: sub-blocks take the integers near their fit that have the
// smallest error with codes assigned anew, the unit is refitted with all of these fixed, and so on; the best round wins.
//
// Part of quantize-inl.h.
#pragma once

namespace phi4edge {
namespace {

template <>
struct Search<Q3_K> {
  using Levels = Integers<-4, 3>;
  static constexpr int kLowest = -32, kHighest = 31;  // scales of the sub-blocks
  static constexpr float kMost = 1.15f, kLeast = 0.5f;
  static constexpr int kStarts = 16, kRefits = 2, kRounds = 1;
};
template <>
struct Search<Q6_K> {
  using Levels = Integers<-32, 31>;
  static constexpr int kLowest = -128, kHighest = 127;
  static constexpr float kMost = 1.015f, kLeast = 0.85f;
  static constexpr int kStarts = 16, kRefits = 1, kRounds = 2;
};
template <>
struct Search<IQ4_XS> {
  using Levels = Iq4Levels;
  static constexpr int kLowest = -32, kHighest = 31;
  static constexpr float kMost = 1.06f, kLeast = 0.62f;
  static constexpr int kStarts = 16, kRefits = 1, kRounds = 2;
};
template <>
struct Search<Q2_K> {
  using Levels = Integers<0, 3>;
  static constexpr int kHighest = 15;  // scales and minimums
  static constexpr float kTrim = 0.08f;
  static constexpr int kRefits = 2, kRounds = 2;
};
template <>
struct Search<Q4_K> {
  using Levels = Integers<0, 15>;
  static constexpr int kHighest = 63;
  static constexpr float kTrim = 0.05f;
  static constexpr int kRefits = 2, kRounds = 2;
};
template <>
struct Search<Q5_K> {
  using Levels = Integers<0, 31>;
  static constexpr int kHighest = 63;
  static constexpr float kTrim = 0.03f;
  static constexpr int kRefits = 2, kRounds = 2;
};

// The unit of the scales of sub-blocks.
template <class S>
struct Units {
  using Levels = Integers<S::kLowest, S::kHighest>;
  static constexpr float kMost = 1.02f, kLeast = 0.72f;
  static constexpr int kStarts = 16, kRefits = 2;
};

PHI4EDGE_INLINE int nearest_integer(float value, int lowest, int highest) {
  return int(nearest_integer(least(most(value, float(lowest)), float(highest))));
}

// ---- w[i] = scale * s[j] * level

template <class F, class W>
class ScaleSearch {
  using S = Search<F>;
  using Levels = typename S::Levels;
  static constexpr int kSub = F::kSub, kSubs = 256 / kSub;

 public:
  ScaleSearch(const float* values, W w) : scaled_(values), w_(w) {}

  void run(typename F::Block& block) {
    for (int j = 0; j < kSubs; ++j) fit_alone(j);
    best_.error = 3.0e38f;
    refine(best_unit());
    uint8_t codes[256];
    for (int j = 0; j < kSubs; ++j) {
      final_codes<Levels, kSub>(scaled_.x + j * kSub, best_.unit * float(best_.s[j]), 0, codes + j * kSub);
    }
    block.scale = scaled_.grid.half(best_.unit);
    store_scales(best_.s, block);
    store_codes(codes, block);
  }

 private:
  struct Choice {
    float unit = 0, error = 0;
    int s[kSubs] = {};
  };

  void fit_alone(int j) {
    const float* x = scaled_.x + j * kSub;
    const W w = w_ + j * kSub;
    ScaleFits<16> fits;
    search_scales<S, kSub>(x, w, fits);
    const int k = smallest(fits.error);
    alone_[j] = fits.scale[k], stiffness_[j] = fits.qq[k];
  }

  // The unit that loses least when the scales are rounded to multiples of it.
  float best_unit() const {
    ScaleFits<16> fits;
    search_scales<Units<S>, kSubs>(alone_, stiffness_, fits);
    return fits.scale[smallest(fits.error)];
  }

  void refine(float start) {
    Choice choice;
    choice.unit = scaled_.grid.round(start);
    for (int j = 0; j < kSubs; ++j) {
      choice.s[j] = nearest_integer(alone_[j] * inverse_of(choice.unit), S::kLowest, S::kHighest);
    }
    for (int round = 0; round < S::kRounds; ++round) {
      float sum_rq = 0, sum_qq = 0;
      choice.error = 0;
      for (int j = 0; j < kSubs; ++j) choose(j, choice, sum_rq, sum_qq);
      if (choice.error < best_.error) best_ = choice;
      if (sum_qq < 1e-30f) return;
      const float unit = scaled_.grid.round(choice.unit + sum_rq / sum_qq);
      if (unit == choice.unit && round > 0) return;
      choice.unit = unit;
    }
  }

  // The best of the integers around s[j], and of those around -s[j].
  void choose(int j, Choice& choice, float& sum_rq, float& sum_qq) const {
    static constexpr int kAround[8] = {0, -1, 1, -2, 2, 0, -1, 1};
    ScaleFits<8> fits;
    int s[8];
    for (int k = 0; k < 8; ++k) {
      s[k] = clamp((k < 5 ? choice.s[j] : -choice.s[j]) + kAround[k], S::kLowest, S::kHighest);
      fits.scale[k] = choice.unit * float(s[k]);
    }
    assign<Levels, kSub>(scaled_.x + j * kSub, w_ + j * kSub, fits);
    const int k = smallest(fits.error);
    choice.s[j] = s[k];
    choice.error += fits.error[k];
    sum_rq += float(s[k]) * fits.rq[k];
    sum_qq += float(s[k] * s[k]) * fits.qq[k];
  }

  const Scaled<256> scaled_;
  const W w_;
  alignas(64) float alone_[kSubs] = {}, stiffness_[kSubs] = {};  // the scale of each sub-block by itself, and its sum of w q q
  Choice best_;
};

// ---- w[i] = scale * s[j] * q - minimum * m[j]

template <class F, class W>
class LineSearch {
  using S = Search<F>;
  using Levels = typename S::Levels;
  static constexpr int kSub = F::kSub, kSubs = 256 / kSub;

 public:
  LineSearch(const float* values, W w) : scaled_(values), w_(w) {}

  void run(typename F::Block& block) {
    for (int j = 0; j < kSubs; ++j) fit_alone(j);
    const float scale = most_of(scale_) / float(S::kHighest);
    const float minimum = most_of(minimum_) / float(S::kHighest);
    best_.error = 3.0e38f;
    refine(scale, minimum);
    if constexpr (S::kHighest < 63) {  // coarse units: it can pay to clip the largest
      refine(scale * 0.92f, minimum);
      refine(scale, minimum * 0.92f);
    }
    uint8_t codes[256];
    for (int j = 0; j < kSubs; ++j) {
      final_codes<Levels, kSub>(scaled_.x + j * kSub, best_.scale * float(best_.s[j]), -best_.minimum * float(best_.m[j]),
                                codes + j * kSub);
    }
    block.scale = scaled_.grid.half(best_.scale);
    block.minimum = scaled_.grid.half(best_.minimum);
    store_scales(best_.s, best_.m, block);
    store_codes(codes, block);
  }

 private:
  struct Choice {
    float scale = 0, minimum = 0, error = 0;
    int s[kSubs] = {}, m[kSubs] = {};
  };
  // The normal equations of the two units, with the codes fixed.
  struct Equations {
    float ss = 0, sm = 0, mm = 0, rs = 0, rm = 0;
  };

  void fit_alone(int j) {
    const float* x = scaled_.x + j * kSub;
    const W w = w_ + j * kSub;
    LineFits fits;
    sum_w_[j] = sum_of<kSub>(w);
    search_lines<S, kSub, false>(x, w, sum_w_[j], fits);
    const int k = smallest(fits.error);
    scale_[j] = fits.scale[k], minimum_[j] = -fits.offset[k];
  }

  void refine(float scale, float minimum) {
    Choice choice;
    choice.scale = scaled_.grid.round(scale), choice.minimum = scaled_.grid.round(minimum);
    for (int j = 0; j < kSubs; ++j) {
      choice.s[j] = nearest_integer(scale_[j] * inverse_of(choice.scale), 0, S::kHighest);
      choice.m[j] = nearest_integer(minimum_[j] * inverse_of(choice.minimum), 0, S::kHighest);
    }
    for (int round = 0; round < S::kRounds; ++round) {
      Equations sums;
      choice.error = 0;
      for (int j = 0; j < kSubs; ++j) choose(j, choice, sums);
      if (choice.error < best_.error) best_ = choice;
      const float scale_before = choice.scale, minimum_before = choice.minimum;
      solve(sums, choice);
      if (round > 0 && choice.scale == scale_before && choice.minimum == minimum_before) return;
    }
  }

  // The best of the pairs of integers around (s[j], m[j]).
  void choose(int j, Choice& choice, Equations& sums) const {
    LineFits fits;
    int s[16], m[16];
    for (int k = 0; k < 16; ++k) {
      const int around_m = k % 4 == 3 ? (k / 4 - 1) * -2 : k % 4 - 1;  // a smaller scale goes with a larger minimum
      s[k] = clamp(choice.s[j] + k / 4 - 1, 0, S::kHighest);
      m[k] = clamp(choice.m[j] + around_m, 0, S::kHighest);
      fits.scale[k] = choice.scale * float(s[k]), fits.offset[k] = -choice.minimum * float(m[k]);
    }
    assign<Levels, kSub>(scaled_.x + j * kSub, w_ + j * kSub, fits);
    const int k = smallest(fits.error);
    choice.s[j] = s[k], choice.m[j] = m[k];
    choice.error += fits.error[k];
    const float scale = float(s[k]), minimum = -float(m[k]);
    sums.ss += scale * scale * fits.qq[k];
    sums.sm += scale * minimum * fits.q[k];
    sums.mm += minimum * minimum * sum_w_[j];
    sums.rs += scale * fits.rq[k];
    sums.rm += minimum * fits.r[k];
  }

  void solve(const Equations& e, Choice& choice) const {
    const float determinant = e.ss * e.mm - e.sm * e.sm;
    float scale = choice.scale, minimum = choice.minimum;
    if (determinant > 1e-6f * e.ss * e.mm) {
      scale += (e.rs * e.mm - e.rm * e.sm) / determinant;
      minimum += (e.rm * e.ss - e.rs * e.sm) / determinant;
    } else if (e.ss > 1e-30f) {
      scale += e.rs / e.ss;
    }
    choice.scale = scaled_.grid.round(most(scale, 0.0f));
    choice.minimum = scaled_.grid.round(most(minimum, 0.0f));
  }

  const Scaled<256> scaled_;
  const W w_;
  float scale_[kSubs] = {}, minimum_[kSubs] = {}, sum_w_[kSubs] = {};  // of each sub-block by itself
  Choice best_;
};

#define X(F, Kind)                                                                \
  template <class W>                                                              \
  PHI4EDGE_INLINE void quantize_block(const float* x, W w, F::Block& block, F*) { \
    Kind<F, W>(x, w).run(block);                                                  \
  }
X(Q3_K, ScaleSearch)
X(Q6_K, ScaleSearch)
X(IQ4_XS, ScaleSearch)
X(Q2_K, LineSearch)
X(Q4_K, LineSearch)
X(Q5_K, LineSearch)
#undef X

}  // namespace
}  // namespace phi4edge
