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
  float* rows;           // [query][kKeyBlock]: the scores of a block of keys, and then their weights
  float* out;            // [query][value_dim]: weighted sums of values
  float *maximum, *sum;  // [query]: of the softmax so far
  // Of 16-bit integers:
  uint8_t* queries;                     // [query / kTileQueries][pair of dims][kTileQueries]
  float *query_scales, *weight_scales;  // [query]

  PHI4EDGE_INLINE explicit AttentionWork(const AttentionTask& task) {
    const int n = task.n_queries;
    rows = static_cast<float*>(task.scratch);
    out = rows + n * kKeyBlock;
    queries = reinterpret_cast<uint8_t*>(out + n * task.value_dim);
    maximum = reinterpret_cast<float*>(queries + query_bytes(n, task.value_dim));
    sum = maximum + n, query_scales = sum + n, weight_scales = query_scales + n;
  }
  static size_t query_bytes(int n_queries, int value_dim) {
    return size_t(n_queries + V::kTileQueries - 1) / V::kTileQueries * V::kTileQueries * value_dim * sizeof(int16_t);
  }
};

size_t attention_scratch_bytes(int n_queries, int value_dim) {
  return n_queries * (kKeyBlock + value_dim + 4) * sizeof(float) + AttentionWork::query_bytes(n_queries, value_dim);
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

// Scores are logarithms to the base 2.
constexpr float kLog2E = 1.44269504f, kHidden = -3.0e38f;

// The share of a score in the softmax, and zero for kHidden; so it is for all while nothing is visible.
struct Weights {
  V::Floats maximum;
  PHI4EDGE_INLINE explicit Weights(float highest) : maximum(V::set1(highest == kHidden ? 0.0f : highest)) {}
  PHI4EDGE_INLINE V::Floats of(V::Floats score) const { return V::sub(exp2(V::sub(score, maximum)), V::set1(0x1p-126f)); }
};

// 16-bit integers: both products are sums of integers.
struct I16Cache {
  using Sum = V::Ints;
  PHI4EDGE_INLINE static V::Ints zero() { return V::set1(0); }
  static constexpr int64_t kLine = kPanelRows * 2 * sizeof(int16_t), kRegister = V::kRows * 2 * sizeof(int16_t);
  static constexpr int64_t kPairs = kPanelRows / 2, kPair = 2 * sizeof(int16_t), kTilePairs = V::kTileQueries * kPair;

  PHI4EDGE_INLINE static int64_t panel_bytes(const AttentionTask& task) {
    return I16Panel::kScaleBytes + task.value_dim * I16Panel::kDimBytes;
  }
  PHI4EDGE_INLINE static const uint8_t* panel(const void* panels, int64_t index, const AttentionTask& task) {
    return static_cast<const uint8_t*>(panels) + index * panel_bytes(task);
  }
  PHI4EDGE_INLINE static int64_t tile_bytes(const AttentionTask& task) { return task.value_dim / 2 * kTilePairs; }
  // A share for register `part` and those after it, of all that there are in a row.
  PHI4EDGE_INLINE static void prefetch_share(const uint8_t* from, int64_t n_bytes, int part, int n, int n_parts) {
    const int64_t begin = n_bytes * part / n_parts, end = n_bytes * (part + n) / n_parts;
    prefetch(from + begin, end - begin);
  }

  // Queries lie side by side as tiles take them, so that a tile reads one stream.
  PHI4EDGE_INLINE static void start(const AttentionTask& task, const AttentionWork& work) {
    alignas(64) int16_t codes[kLargestHead];
    for (int i = 0; i < task.n_queries; ++i) {
      work.query_scales[i] = kLog2E * to_i16(task.queries + i * task.query_stride, task.head_dim, kI16Keys, codes);
      uint8_t* to = work.queries + i / V::kTileQueries * tile_bytes(task) + i % V::kTileQueries * kPair;
      for (int d = 0; d < task.value_dim; d += 2) std::memcpy(to + d / 2 * kTilePairs, codes + d, kPair);
    }
  }

  // acc[r][t] += sum over lines of a pair of codes in each lane times a pair of x, which is LineStride bytes behind the one
  // before it, and TokenStride bytes behind that of the token before
  template <int64_t LineStride, int64_t TokenStride, int N, int T>
  PHI4EDGE_INLINE static void add_products(const uint8_t* lines, int64_t n_lines, int64_t next_lines, const uint8_t* x,
                                           V::Ints (&acc)[N][T]) {
    for (int64_t line = 0; line < n_lines; ++line) {
      V::Ints codes[N];
      for (int r = 0; r < N; ++r) codes[r] = V::load_ints(lines + r / kParts * next_lines + r % kParts * kRegister);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < N; ++r) acc[r][t] = V::dot16(acc[r][t], codes[r], x + t * TokenStride);
      }
      lines += kLine, x += LineStride;
    }
  }

  template <int N, int T>
  PHI4EDGE_INLINE static void add_scores(const AttentionTask& task, const AttentionWork& work, int64_t part, int64_t query,
                                         V::Ints (&acc)[N][T]) {
    const uint8_t* keys = panel(task.keys, part / kParts, task);
    if (reads_once(task)) {
      prefetch_share(panel(task.values, part / kParts, task), panel_bytes(task), int(part % kParts), N, kParts);
    }
    add_products<kTilePairs, kPair>(keys + I16Panel::kScaleBytes + part % kParts * kRegister, task.value_dim / 2,
                                    panel_bytes(task), work.queries + query / V::kTileQueries * tile_bytes(task), acc);
  }
  PHI4EDGE_INLINE static V::Floats score(const AttentionTask& task, const AttentionWork& work, int64_t part, int64_t query,
                                         V::Ints sum) {
    const auto* scales = reinterpret_cast<const float*>(panel(task.keys, part / kParts, task)) + part % kParts * V::kRows;
    return V::mul(V::mul(V::load(scales), V::set1(work.query_scales[query])), V::to_float(sum));
  }

  // Scores to weights, times the scales of their values; returns the sum of the weights alone.
  PHI4EDGE_INLINE static float set_weights(const AttentionTask& task, const AttentionWork& work, int64_t key0, int n_keys,
                                           int query) {
    float* row = work.rows + query * kKeyBlock;
    const Weights weights(work.maximum[query]);
    const auto zero = V::set1(0.0f);
    auto total = zero, largest = zero, sum = zero;
    for (int k = 0; k < n_keys; k += V::kRows) {
      const auto* scales = reinterpret_cast<const float*>(panel(task.values, (key0 + k) / kPanelRows, task)) + k % kPanelRows;
      const auto weight = weights.of(V::load(row + k));
      total = V::add(total, weight);
      // Behind the last key is anything, even NaN; its weight is zero, and so is the maximum of both.
      const auto scaled = V::max(V::mul(weight, V::load(scales)), zero);
      largest = V::max(largest, scaled);
      sum = V::add(sum, scaled);
      V::store(row + k, scaled);
    }
    const float of_largest = V::reduce_max(largest) / kI16Weight, of_sum = V::reduce_sum(sum) / kI16WeightSum;
    work.weight_scales[query] = of_largest > of_sum ? of_largest : of_sum;
    return V::reduce_sum(total);
  }
  // And to codes, at the start of the row, each behind what was read already.
  PHI4EDGE_INLINE static void finish_weights(const AttentionWork& work, int n_keys, int query) {
    constexpr float kTiny = 1e-37f;  // its reciprocal is finite; values below 2^-90 or so thus become zero
    float* row = work.rows + query * kKeyBlock;
    auto* codes = reinterpret_cast<int16_t*>(row);
    const auto to_code = V::set1(work.weight_scales[query] > kTiny ? 1.0f / work.weight_scales[query] : 0.0f);
    for (int k = 0; k < n_keys; k += V::kRows) V::store_codes(codes + k, V::round(V::mul(V::load(row + k), to_code)));
  }

  template <int N, int T>
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                         int part, int64_t query, V::Ints (&acc)[N][T]) {
    const int64_t first_panel = first_key / kPanelRows;
    if (reads_once(task)) {
      constexpr int64_t kPanels = kKeyBlock / kPanelRows;
      prefetch_share(panel(task.keys, first_panel + kPanels, task), kPanels * panel_bytes(task), part, N,
                     task.value_dim / V::kRows);
    }
    const auto* weights = reinterpret_cast<const uint8_t*>(work.rows + query * kKeyBlock);
    const uint8_t* values = panel(task.values, first_panel, task) + I16Panel::kScaleBytes + part / kParts * kPairs * kLine +
                            part % kParts * kRegister;
    for (int key = 0; key < n_keys; key += kPanelRows) {
      add_products<kPair, kKeyBlock * sizeof(float)>(values, kPairs, kPairs * kLine, weights, acc);
      values += panel_bytes(task), weights += kPairs * kPair;
    }
  }
  PHI4EDGE_INLINE static V::Floats value(const AttentionWork& work, int64_t query, V::Ints sum, V::Floats so_far) {
    return V::fma(V::to_float(sum), V::set1(work.weight_scales[query]), so_far);
  }
};

// What caches have in common whose products are sums of floats.
struct FloatSums {
  using Sum = V::Floats;
  PHI4EDGE_INLINE static V::Floats zero() { return V::set1(0.0f); }

  PHI4EDGE_INLINE static void start(const AttentionTask&, const AttentionWork&) {}
  PHI4EDGE_INLINE static V::Floats score(const AttentionTask&, const AttentionWork&, int64_t, int64_t, V::Floats sum) {
    return V::mul(sum, V::set1(kLog2E));
  }
  PHI4EDGE_INLINE static float set_weights(const AttentionTask&, const AttentionWork& work, int64_t, int n_keys, int query) {
    float* row = work.rows + query * kKeyBlock;
    const Weights weights(work.maximum[query]);
    auto total = V::set1(0.0f);
    for (int k = 0; k < n_keys; k += V::kRows) {
      const auto weight = weights.of(V::load(row + k));
      V::store(row + k, weight);
      total = V::add(total, weight);
    }
    return V::reduce_sum(total);
  }
  PHI4EDGE_INLINE static void finish_weights(const AttentionWork&, int, int) {}
  PHI4EDGE_INLINE static V::Floats value(const AttentionWork&, int64_t, V::Floats sum, V::Floats so_far) {
    return V::add(so_far, sum);
  }
};

// Floats.  Each of the two fetches what the other one reads next.
struct FloatCache : FloatSums {
  static constexpr int64_t kBytes = sizeof(float);

  // acc[r][t] += q . k of N registers of keys, from register `part` on, and T queries
  template <int N, int T>
  PHI4EDGE_INLINE static void add_scores(const AttentionTask& task, const AttentionWork&, int64_t part, int64_t query,
                                         V::Floats (&acc)[N][T]) {
    const int64_t line = kPanelRows * kBytes, panel_bytes = line * task.head_dim;
    const auto* w = static_cast<const uint8_t*>(task.keys) + part / kParts * panel_bytes + part % kParts * V::kRows * kBytes;
    if (reads_once(task)) {
      const int64_t key_bytes = task.value_dim * kBytes;
      prefetch(static_cast<const uint8_t*>(task.values) + part * V::kRows * key_bytes, N * V::kRows * key_bytes);
    }
    float_tile<F32, N, T>(w, line, panel_bytes, task.head_dim, task.queries + query * task.query_stride, task.query_stride,
                          acc);
  }

  // acc[r][t] += sum over keys of weight * value, of N registers of dims, from register `part` on
  template <int N, int T>
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                         int part, int64_t query, V::Floats (&acc)[N][T]) {
    const int64_t line = task.value_dim * kBytes;
    const auto* w = static_cast<const uint8_t*>(task.values) + first_key * line + part * V::kRows * kBytes;
    if (reads_once(task)) {  // a share of the next block's keys with each register of dims
      const int64_t share = kKeyBlock * V::kRows * kBytes;
      prefetch(static_cast<const uint8_t*>(task.keys) + (first_key + kKeyBlock) * task.head_dim * kBytes + part * share,
               N * share);
    }
    float_tile<F32, N, T>(w, line, kPanelRows * kBytes, n_keys, work.rows + query * kKeyBlock, kKeyBlock, acc);
  }
};

// One signed byte a value.
struct Code {
  using Block = int8_t;
  template <class W>
  static auto load(const void* codes) {
    return W::to_float(W::load_i8(codes));
  }
};

// A cache of KvBlocks.  Codes are multiplied as they are, and their scale once: with the sum over the dims of a block of keys,
// with the weights of a block of values.  Each fetches what the other one reads next, which may lie behind the end.
struct BlockCache : FloatSums {
  template <int N, int T>
  PHI4EDGE_INLINE static void add_scores(const AttentionTask& task, const AttentionWork&, int64_t part, int64_t query,
                                         V::Floats (&acc)[N][T]) {
    const int64_t n_blocks = task.value_dim / KvBlock::kDims, panel_bytes = n_blocks * int64_t(sizeof(KvBlock));
    const auto* block = static_cast<const KvBlock*>(task.keys) + part / kParts * n_blocks;
    const auto* values = static_cast<const KvBlock*>(task.values) + part / kParts * n_blocks;
    const float* queries = task.queries + query * task.query_stride;
    for (int64_t dim = 0; dim < task.head_dim; dim += KvBlock::kDims, ++block, ++values) {
      if (part % kParts == 0) {
        for (int r = 0; r < N; r += kParts) prefetch(values + r / kParts * n_blocks, sizeof(KvBlock));
      }
      typename V::Floats sum[N][T];
      for (int r = 0; r < N; ++r) {
        for (int t = 0; t < T; ++t) sum[r][t] = V::set1(0.0f);
      }
      const auto* codes = reinterpret_cast<const uint8_t*>(block->codes) + part % kParts * V::kRows;
      const int64_t n_dims = task.head_dim - dim < KvBlock::kDims ? task.head_dim - dim : KvBlock::kDims;
      float_tile<Code, N, T>(codes, kPanelRows, panel_bytes, n_dims, queries + dim, task.query_stride, sum);
      for (int r = 0; r < N; ++r) {
        const auto scale = V::load_half(block[r / kParts * n_blocks].scales + (part + r) % kParts * V::kRows);
        for (int t = 0; t < T; ++t) acc[r][t] = V::fma(scale, sum[r][t], acc[r][t]);
      }
    }
  }

  template <int N, int T>
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys,
                                         int part, int64_t query, V::Floats (&acc)[N][T]) {
    static_assert(KvBlock::kDims % (N * V::kRows) == 0, "the registers of a tile are of one block");
    const int64_t n_blocks = task.value_dim / KvBlock::kDims;
    const int dim = part * V::kRows;
    const float* weights = work.rows + query * kKeyBlock;
    const auto* block = static_cast<const KvBlock*>(task.values) + first_key / kPanelRows * n_blocks + dim / KvBlock::kDims;
    const auto* next_keys =
        static_cast<const KvBlock*>(task.keys) + (first_key + kKeyBlock) / kPanelRows * n_blocks + dim / KvBlock::kDims;
    for (int key = 0; key < n_keys; key += kPanelRows, block += n_blocks, next_keys += n_blocks) {
      if (dim % KvBlock::kDims == 0) prefetch(next_keys, sizeof(KvBlock));
      alignas(64) float scaled[T][kPanelRows];
      for (int i = 0; i < kPanelRows; i += V::kRows) {
        const auto scale = V::load_half(block->scales + i);
        for (int t = 0; t < T; ++t) V::store(scaled[t] + i, V::mul(scale, V::load(weights + t * kKeyBlock + key + i)));
      }
      const auto* codes = reinterpret_cast<const uint8_t*>(block->codes) + dim % KvBlock::kDims;
      const int n_steps = n_keys - key < kPanelRows ? n_keys - key : kPanelRows;
      float_tile<Code, N, T>(codes, KvBlock::kDims, kPanelRows, n_steps, scaled[0], kPanelRows, acc);
    }
  }
};

}  // namespace
}  // namespace phi4edge
