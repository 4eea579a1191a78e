// How attention multiplies with the keys and values of each type of cache.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

constexpr int kKeyBlock = 128;  // keys whose scores are held at once; blocks start at multiples of it, so that a query's
                                // result does not depend on how the prompt was cut

// What attention computes in: AttentionTask::scratch.
struct AttentionWork {
  float* rows;          // [query][kKeyBlock]: the scores of a block of keys, and then their weights
  float* segment_sums;  // AttentionSums of a segment that is not the first
  // Of caches of integers:
  uint8_t* queries;      // [query / kTileQueries][pair of dims][kTileQueries]
  int16_t* weights;      // [block of dims][query][kKeyBlock]
  float* query_scales;   // [query]
  float* weight_scales;  // [block of dims][query]

  PHI4EDGE_INLINE explicit AttentionWork(const AttentionTask& task) {
    const int64_t n = task.n_queries;
    rows = static_cast<float*>(task.scratch);
    queries = reinterpret_cast<uint8_t*>(rows + n * kKeyBlock);
    weights = reinterpret_cast<int16_t*>(queries + query_bytes(n, task.value_dim));
    segment_sums = reinterpret_cast<float*>(weights + n * max_blocks(task.value_dim) * kKeyBlock);
    query_scales = segment_sums + AttentionSums::n_floats(n, task.value_dim);
    weight_scales = query_scales + n;
  }
  static int64_t max_blocks(int64_t value_dim) { return (value_dim + KvBlock::kDims - 1) / KvBlock::kDims; }
  static int64_t query_bytes(int64_t n_queries, int64_t value_dim) {
    return (n_queries + V::kTileQueries - 1) / V::kTileQueries * V::kTileQueries * value_dim * int64_t(sizeof(int16_t));
  }
};

size_t attention_scratch_bytes(int n_queries, int value_dim) {
  const int64_t blocks = AttentionWork::max_blocks(value_dim);
  const int64_t floats = n_queries * (kKeyBlock + 1 + blocks) + AttentionSums::n_floats(n_queries, value_dim);
  return size_t(floats * int64_t(sizeof(float)) + n_queries * blocks * kKeyBlock * int64_t(sizeof(int16_t)) +
                AttentionWork::query_bytes(n_queries, value_dim));
}

// With few queries keys and values are read once, as fast as they come.
PHI4EDGE_INLINE bool reads_once(const AttentionTask& task) { return task.n_queries <= V::kTileQueries; }

// 2^x for x <= 127; relative error below 2e-7; far below it is 2^-126.  The polynomial is one of least relative error.
PHI4EDGE_INLINE V::Floats exp2(V::Floats x) {
  x = V::max(V::set1(-126.0f), x);  // in this order a NaN stays one
  const auto n = V::round(x);
  const auto r = V::sub(x, V::to_float(n));
  auto p = V::set1(0.00132647273f);
  p = V::fma(p, r, V::set1(0.00967151299f));
  p = V::fma(p, r, V::set1(0.0555073358f));
  p = V::fma(p, r, V::set1(0.240222424f));
  p = V::fma(p, r, V::set1(0.693147004f));
  p = V::fma(p, r, V::set1(1.0f));
  return V::as_floats(V::add(V::as_ints(p), V::shift_left(n, 23)));
}

PHI4EDGE_INLINE float exp2_of_one(float x) {
  alignas(64) float lanes[V::kRows];
  V::store(lanes, exp2(V::set1(x)));
  return lanes[0];
}

// Scores are logarithms to the base 2.
constexpr float kLog2E = 1.44269504f, kHidden = -3.0e38f;

// The share of a score in the softmax, and zero for kHidden; so it is for all while nothing is visible.
struct Weights {
  V::Floats maximum;
  PHI4EDGE_INLINE explicit Weights(float highest) : maximum(V::set1(highest == kHidden ? 0.0f : highest)) {}
  PHI4EDGE_INLINE V::Floats of(V::Floats score) const { return V::sub(exp2(V::sub(score, maximum)), V::set1(0x1p-126f)); }
};

// Keys and values of 16 positions in blocks of dims: 16 scales each, and then lines of 16 pairs of codes.
struct I16Codes {
  using Code = int16_t;
  using Scale = float;
  static constexpr float kWeightSum = kI16WeightSum;
  PHI4EDGE_INLINE static int64_t block_dims(const AttentionTask& task) { return task.value_dim; }
  PHI4EDGE_INLINE static V::Ints load_pairs(const uint8_t* p) { return V::load_ints(p); }
  PHI4EDGE_INLINE static V::Floats load_scales(const uint8_t* p) { return V::load(reinterpret_cast<const float*>(p)); }
};
struct Q8Codes {
  using Code = int8_t;
  using Scale = uint16_t;
  static constexpr float kWeightSum = kKeyBlock * kI16Weight;  // whatever they are: times 127 it is within 32 bits
  PHI4EDGE_INLINE static int64_t block_dims(const AttentionTask&) { return KvBlock::kDims; }
  PHI4EDGE_INLINE static V::Ints load_pairs(const uint8_t* p) { return V::load_pairs_i8(p); }
  PHI4EDGE_INLINE static V::Floats load_scales(const uint8_t* p) { return V::load_half(p); }
};

// body(r, t) for N registers and T queries; unrolled, or GCC keeps what it indexes in memory all the time.
template <int N, int T, class Body>
PHI4EDGE_INLINE void for_tile(const Body& body) {
  unroll<T>([&](auto t) { unroll<N>([&](auto r) { body(r.value, t.value); }); });
}

// Both products are sums of integers, codes of keys and values with 16-bit ones of queries and weights.
template <class C>
struct IntegerCache {
  static constexpr int64_t kPair = 2 * sizeof(typename C::Code), kLine = kPanelRows * kPair, kRegister = V::kRows * kPair;
  static constexpr int64_t kScaleBytes = kPanelRows * sizeof(typename C::Scale), kScaleRegister = kScaleBytes / kParts;
  static constexpr int64_t kKeyPairs = kPanelRows / 2;
  static constexpr int64_t kPair16 = 2 * sizeof(int16_t), kTilePairs = V::kTileQueries * kPair16;

  // Where things are in a cache.
  struct Place {
    int64_t dims, block_bytes, n_blocks, panel_bytes;

    PHI4EDGE_INLINE explicit Place(const AttentionTask& task)
        : dims(C::block_dims(task)),
          block_bytes(kScaleBytes + dims * kLine / 2),
          n_blocks(task.value_dim / dims),
          panel_bytes(n_blocks * block_bytes) {}
    PHI4EDGE_INLINE const uint8_t* block(const void* panels, int64_t panel, int64_t block) const {
      return static_cast<const uint8_t*>(panels) + panel * panel_bytes + block * block_bytes;
    }
  };

  // Queries lie side by side as tiles take them, so that a tile reads one stream.
  PHI4EDGE_INLINE static int64_t tile_bytes(const AttentionTask& task) { return task.value_dim / 2 * kTilePairs; }
  PHI4EDGE_INLINE static void start(const AttentionTask& task, const AttentionWork& work) {
    alignas(64) int16_t codes[kLargestHead + KvBlock::kDims];
    for (int i = 0; i < task.n_queries; ++i) {
      work.query_scales[i] = kLog2E * to_i16(task.queries + i * task.query_stride, task.head_dim, kI16Keys, codes);
      std::memset(codes + task.head_dim, 0, size_t(task.value_dim - task.head_dim) * sizeof(int16_t));
      uint8_t* to = work.queries + i / V::kTileQueries * tile_bytes(task) + i % V::kTileQueries * kPair16;
      for (int d = 0; d < task.value_dim; d += 2) std::memcpy(to + d / 2 * kTilePairs, codes + d, kPair16);
    }
  }

  // acc[r][t] += sum over lines of a pair of codes in each lane times a pair of x, which is LineStride bytes behind the one
  // before it, and TokenStride bytes behind that of the token before.  Register r is next_lines behind the one before where
  // that ends a panel's.  Fetches: what is `ahead` bytes behind too.
  template <bool Fetches, int64_t LineStride, int64_t TokenStride, int N, int T>
  PHI4EDGE_INLINE static void add_products(const uint8_t* lines, int64_t n_lines, int64_t next_lines, int64_t ahead,
                                           const uint8_t* x, V::Ints (&acc)[N][T]) {
    for (int64_t line = 0; line < n_lines; ++line) {
      V::Ints codes[N];
      for (int r = 0; r < N; ++r) {
        const uint8_t* at = lines + r / kParts * next_lines + r % kParts * kRegister;
        codes[r] = C::load_pairs(at);
        if (Fetches && r % kParts == 0) __builtin_prefetch(at + ahead, 0, 2);
      }
      for (int t = 0; t < T; ++t) {
        if constexpr (N == 1) {
          acc[0][t] = V::dot16(acc[0][t], codes[0], x + t * TokenStride);
        } else {
          const auto pair = V::splat4(reinterpret_cast<const int8_t*>(x + t * TokenStride));
          for (int r = 0; r < N; ++r) acc[r][t] = V::dot16(acc[r][t], codes[r], pair);
        }
      }
      lines += kLine, x += LineStride;
    }
  }

  // score[r][t] of N registers of keys, from register `part` on, and T queries
  template <bool Fetches, int N, int T>
  PHI4EDGE_INLINE static void score(const AttentionTask& task, const AttentionWork& work, int64_t part, int64_t query,
                                    V::Floats (&score)[N][T]) {
    const Place place(task);
    const int64_t ahead = static_cast<const uint8_t*>(task.values) - static_cast<const uint8_t*>(task.keys);
    const uint8_t* x = work.queries + query / V::kTileQueries * tile_bytes(task);
    for (int64_t i = 0; i < place.n_blocks; ++i, x += place.dims / 2 * kTilePairs) {
      const uint8_t* block = place.block(task.keys, part / kParts, i);
      if constexpr (Fetches)
        unroll<N>([&](auto r) { __builtin_prefetch(block + r.value / kParts * place.panel_bytes + ahead, 0, 2); });
      typename V::Ints sum[N][T];
      for_tile<N, T>([&](int r, int t) { sum[r][t] = V::set1(0); });
      add_products<Fetches, kTilePairs, kPair16>(block + kScaleBytes + part % kParts * kRegister, place.dims / 2,
                                                 place.panel_bytes, ahead, x, sum);
      typename V::Floats scale[N];
      unroll<N>([&](auto r) {
        const int64_t register_part = part + r.value;
        scale[r.value] =
            C::load_scales(place.block(task.keys, register_part / kParts, i) + register_part % kParts * kScaleRegister);
      });
      for_tile<N, T>([&](int r, int t) {
        const auto product = V::to_float(sum[r][t]);
        score[r][t] = i == 0 ? V::mul(product, scale[r]) : V::fma(product, scale[r], score[r][t]);
      });
    }
    for_tile<N, T>([&](int r, int t) { score[r][t] = V::mul(score[r][t], V::set1(work.query_scales[query + t])); });
  }
  template <int N, int T>
  PHI4EDGE_INLINE static void scores(const AttentionTask& task, const AttentionWork& work, int64_t part, int64_t query,
                                     V::Floats (&out)[N][T]) {
    reads_once(task) ? score<true, N, T>(task, work, part, query, out) : score<false, N, T>(task, work, part, query, out);
  }

  // Weights to codes, times the scales of the values: of each block of dims.
  PHI4EDGE_INLINE static void finish_weights(const AttentionTask& task, const AttentionWork& work, int64_t key0, int n_keys,
                                             int query) {
    constexpr float kTiny = 1e-37f;  // its reciprocal is finite; values below 2^-90 or so thus become zero
    const Place place(task);
    const float* row = work.rows + query * kKeyBlock;
    const auto zero = V::set1(0.0f);
    for (int64_t i = 0; i < place.n_blocks; ++i) {
      alignas(64) float scaled[kKeyBlock];
      auto largest = zero, sum = zero;
      for (int k = 0; k < n_keys; k += V::kRows) {
        const uint8_t* scales =
            place.block(task.values, (key0 + k) / kPanelRows, i) + k % kPanelRows / V::kRows * kScaleRegister;
        // Behind the last key is anything, even NaN; its weight is zero, and so is the maximum of both.
        const auto weight = V::max(V::mul(V::load(row + k), C::load_scales(scales)), zero);
        largest = V::max(largest, weight);
        sum = V::add(sum, weight);
        V::store(scaled + k, weight);
      }
      const float of_largest = V::reduce_max(largest) / kI16Weight, of_sum = V::reduce_sum(sum) / C::kWeightSum;
      const float scale = of_largest > of_sum ? of_largest : of_sum;
      work.weight_scales[i * task.n_queries + query] = scale;
      const auto to_code = V::set1(scale > kTiny ? 1.0f / scale : 0.0f);
      int16_t* codes = work.weights + (i * task.n_queries + query) * kKeyBlock;
      for (int k = 0; k < n_keys; k += V::kRows) V::store_codes(codes + k, V::round(V::mul(V::load(scaled + k), to_code)));
    }
  }

  // sum[r][t] of the weights of a block of keys with N registers of dims, from register `part` on; they are of one block of
  // dims
  template <bool Fetches, int N, int T>
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                         int64_t part, int64_t query, V::Floats (&out)[N][T]) {
    const Place place(task);
    const int64_t first_panel = first_key / kPanelRows, block = part * V::kRows / place.dims;
    const int64_t within = part - block * place.dims / V::kRows;
    const int64_t ahead = static_cast<const uint8_t*>(task.keys) - static_cast<const uint8_t*>(task.values) +
                          kKeyBlock / kPanelRows * place.panel_bytes;
    const int64_t codes_of = block * task.n_queries + query;
    const auto* weights = reinterpret_cast<const uint8_t*>(work.weights + codes_of * kKeyBlock);
    const uint8_t* values = place.block(task.values, first_panel, block) + kScaleBytes + within / kParts * kKeyPairs * kLine +
                            within % kParts * kRegister;
    typename V::Ints sum[N][T];
    for_tile<N, T>([&](int r, int t) { sum[r][t] = V::set1(0); });
    for (int key = 0; key < n_keys; key += kPanelRows) {
      add_products<Fetches, kPair16, kKeyBlock * sizeof(int16_t)>(values, kKeyPairs, kKeyPairs * kLine, ahead, weights, sum);
      if (Fetches && within == 0) __builtin_prefetch(values - kScaleBytes + ahead, 0, 2);
      values += place.panel_bytes, weights += kKeyPairs * kPair16;
    }
    for_tile<N, T>(
        [&](int r, int t) { out[r][t] = V::mul(V::to_float(sum[r][t]), V::set1(work.weight_scales[codes_of + t])); });
  }
  template <int N, int T>
  PHI4EDGE_INLINE static void values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                     int64_t part, int64_t query, V::Floats (&out)[N][T]) {
    reads_once(task) ? add_values<true, N, T>(task, work, first_key, n_keys, part, query, out)
                     : add_values<false, N, T>(task, work, first_key, n_keys, part, query, out);
  }
};

// Floats.  Each of the two fetches what the other one reads next.
struct FloatCache {
  static constexpr int64_t kBytes = sizeof(float);

  PHI4EDGE_INLINE static void start(const AttentionTask&, const AttentionWork&) {}
  PHI4EDGE_INLINE static void finish_weights(const AttentionTask&, const AttentionWork&, int64_t, int, int) {}

  template <int N, int T>
  PHI4EDGE_INLINE static void scores(const AttentionTask& task, const AttentionWork&, int64_t part, int64_t query,
                                     V::Floats (&out)[N][T]) {
    const int64_t line = kPanelRows * kBytes, panel_bytes = line * task.head_dim;
    const auto* w = static_cast<const uint8_t*>(task.keys) + part / kParts * panel_bytes + part % kParts * V::kRows * kBytes;
    if (reads_once(task)) {
      const int64_t key_bytes = task.value_dim * kBytes;
      prefetch(static_cast<const uint8_t*>(task.values) + part * V::kRows * key_bytes, N * V::kRows * key_bytes);
    }
    for_tile<N, T>([&](int r, int t) { out[r][t] = V::set1(0.0f); });
    float_tile<F32, N, T>(w, line, panel_bytes, task.head_dim, task.queries + query * task.query_stride, task.query_stride,
                          out);
    for_tile<N, T>([&](int r, int t) { out[r][t] = V::mul(out[r][t], V::set1(kLog2E)); });
  }

  template <int N, int T>
  PHI4EDGE_INLINE static void values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                     int64_t part, int64_t query, V::Floats (&out)[N][T]) {
    const int64_t line = task.value_dim * kBytes;
    const auto* w = static_cast<const uint8_t*>(task.values) + first_key * line + part * V::kRows * kBytes;
    if (reads_once(task)) {  // a share of the next block's keys with each register of dims
      const int64_t share = kKeyBlock * V::kRows * kBytes;
      prefetch(static_cast<const uint8_t*>(task.keys) + (first_key + kKeyBlock) * task.head_dim * kBytes + part * share,
               N * share);
    }
    for_tile<N, T>([&](int r, int t) { out[r][t] = V::set1(0.0f); });
    float_tile<F32, N, T>(w, line, kPanelRows * kBytes, n_keys, work.rows + query * kKeyBlock, kKeyBlock, out);
  }
};

}  // namespace
}  // namespace phi4edge
