// What the quantizers compute with: vectors of candidates, the levels of codes, and values on the grid of the file's halves.
//
// Part of quantize-inl.h.  A file of an instruction set says how many floats its registers hold: kRegisterLanes.
#pragma once

namespace phi4edge {
namespace {

// GCC's and Clang's portable vectors.
template <int Lanes>
struct VectorOf {
  typedef float Floats __attribute__((vector_size(4 * Lanes)));
  typedef int32_t Ints __attribute__((vector_size(4 * Lanes)));
};
constexpr int register_lanes(int k) { return k < kRegisterLanes ? k : kRegisterLanes; }
template <int K>  // a register for K floats, or for a part of them
using Floats = typename VectorOf<register_lanes(K)>::Floats;

template <class T>
PHI4EDGE_INLINE T load(const float* from) {
  T values;
  std::memcpy(&values, from, sizeof values);
  return values;
}
template <class T>
PHI4EDGE_INLINE void store(T values, float* to) {
  std::memcpy(to, &values, sizeof values);
}

// Weights that are all one, in place of a pointer to them: multiplications with them vanish.
struct Ones {
  constexpr float operator[](int) const { return 1; }
  constexpr Ones operator+(int64_t) const { return {}; }
};
template <class T>
PHI4EDGE_INLINE T load(Ones) {
  return T{} + 1.0f;
}

PHI4EDGE_INLINE float least(float a, float b) { return a < b ? a : b; }
PHI4EDGE_INLINE float most(float a, float b) { return a > b ? a : b; }
PHI4EDGE_INLINE float magnitude(float a) { return a < 0 ? -a : a; }
PHI4EDGE_INLINE int clamp(int a, int low, int high) { return a < low ? low : a > high ? high : a; }
template <class T>
PHI4EDGE_INLINE T magnitude(T a) {
  return a < 0 ? -a : a;
}
template <class T>
PHI4EDGE_INLINE T clamp(T a, float low, float high) {
  const T lowest = T{} + low, highest = T{} + high;
  a = a < lowest ? lowest : a;
  return a > highest ? highest : a;
}
template <class T>
PHI4EDGE_INLINE T inverse_of(T scale) {
  return magnitude(scale) < 1e-30f ? T{} : 1.0f / scale;
}

constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
PHI4EDGE_INLINE float nearest_integer(float value) { return (value + kRound) - kRound; }

// Levels a code stands for: the integers Lo..Hi.
template <int Lo, int Hi>
struct Integers {
  static constexpr float kLowest = float(Lo), kHighest = float(Hi);
  template <class T>
  PHI4EDGE_INLINE static T nearest(T y) {
    return (clamp(y, kLowest, kHighest) + kRound) - kRound;
  }
  PHI4EDGE_INLINE static uint8_t index(float level) { return uint8_t(int(level) - Lo); }
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
constexpr NearestIq4 kNearestIq4{};

struct Iq4Levels {
  static constexpr float kLowest = -127, kHighest = 113;
  template <class T>
  PHI4EDGE_INLINE static T nearest(T y) {
    constexpr int kLanes = sizeof(T) / 4;
    const auto at = __builtin_convertvector(2 * (clamp(y, kLowest, kHighest) - kLowest), typename VectorOf<kLanes>::Ints);
    T levels;
    for (int lane = 0; lane < kLanes; ++lane) levels[lane] = kNearestIq4.level[at[lane]];
    return levels;
  }
  PHI4EDGE_INLINE static uint8_t index(float level) {
    int i = 0;
    for (int border = 0; border < 15; ++border) i += float(kIq4Table[border]) < level;
    return uint8_t(i);
  }
};

// Blocks are scaled by a power of two, to a largest magnitude in 1..2; the halves of the file then lie on this grid.
class HalfGrid {
 public:
  explicit HalfGrid(float largest) {
    // The exponent of the largest value; smaller blocks than 2^-40 are zero in every format.
    int exponent = int(std::bit_cast<uint32_t>(largest) >> 23) - 127;
    exponent = clamp(exponent, -40, 126);
    to_block_ = std::bit_cast<float>(uint32_t(127 - exponent) << 23);
    to_file_ = std::bit_cast<float>(uint32_t(127 + exponent) << 23);
  }
  float to_block(float value) const { return value * to_block_; }
  Half half(float scaled) const {
    const Half half = float_to_half(least(most(scaled * to_file_, -65504.0f), 65504.0f));
    return half == 0x8000 ? Half(0) : half;  // the sign of a zero depends on the instructions
  }
  float round(float scaled) const { return to_block(half_to_float(half(scaled))); }
  // The same for many: to multiples of the least half, and then to eleven bits.
  template <int K>
  PHI4EDGE_INLINE void round(float (&scaled)[K]) const {
    const float largest = 65504.0f * to_block_, shift = kRound * 0x1p-24f * to_block_;
    for (int k = 0; k < K; ++k) {
      const float value = (least(most(scaled[k], -largest), largest) + shift) - shift, spread = value * 8193.0f;
      scaled[k] = spread - (spread - value);
    }
  }

 private:
  float to_block_, to_file_;
};

// N values on their grid.
template <int N>
struct Scaled {
  alignas(64) float x[N];
  HalfGrid grid;
  PHI4EDGE_INLINE explicit Scaled(const float* values) : grid(magnitude_of_all(values)) {
    for (int i = 0; i < N; ++i) x[i] = grid.to_block(values[i]);
  }
  PHI4EDGE_INLINE static float magnitude_of_all(const float* values) {
    using T = Floats<16>;
    T largest{};
    for (int i = 0; i < N; i += kRegisterLanes) {
      const T x = magnitude(load<T>(values + i));
      largest = x > largest ? x : largest;
    }
    float all = 0;
    for (int lane = 0; lane < kRegisterLanes; ++lane) all = most(all, largest[lane]);
    return all;
  }
};

}  // namespace
}  // namespace phi4edge
