// Attention of a tile of queries over one KV head.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

constexpr int kKeyBlock = 128;  // keys whose scores are held at once; blocks start at multiples of it, so that a query's
                                // result does not depend on how the prompt was cut

// With few queries keys and values are read once, as fast as they come.
PHI4EDGE_INLINE bool reads_once(const AttentionTask& task) { return task.n_queries <= V::kTileQueries; }

// A cache of numbers: halves or floats.  Each of the two fetches what the other one reads next, which may lie behind the end.
template <class E>
struct NumberCache {
  static constexpr int64_t kBytes = sizeof(typename E::Block);

  PHI4EDGE_INLINE static void prefetch(const void* from, int64_t n_bytes) {
    for (int64_t i = 0; i < n_bytes; i += kLineBytes) __builtin_prefetch(static_cast<const uint8_t*>(from) + i, 0, 2);
  }

  // acc[r][t] += q . k of N registers of keys, from register `part` on, and T queries
  template <int N, int T>
  PHI4EDGE_INLINE static void add_scores(const AttentionTask& task, int64_t part, const float* queries,
                                         V::Floats (&acc)[N][T]) {
    const int64_t line = kPanelRows * kBytes, panel_bytes = line * task.head_dim;
    const auto* w = static_cast<const uint8_t*>(task.keys) + part / kParts * panel_bytes + part % kParts * V::kRows * kBytes;
    if (reads_once(task)) {
      const int64_t key_bytes = task.value_dim * kBytes;
      prefetch(static_cast<const uint8_t*>(task.values) + part * V::kRows * key_bytes, N * V::kRows * key_bytes);
    }
    float_tile<E, N, T>(w, line, panel_bytes, task.head_dim, queries, task.query_stride, acc);
  }

  // acc[r][t] += sum over keys of weight * value, of N registers of dims, from register `part` on
  template <int N, int T>
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, int64_t first_key, int n_keys, int part,
                                         const float* weights, V::Floats (&acc)[N][T]) {
    const int64_t line = task.value_dim * kBytes;
    const auto* w = static_cast<const uint8_t*>(task.values) + first_key * line + part * V::kRows * kBytes;
    if (reads_once(task)) {  // a share of the next block's keys with each register of dims
      const int64_t share = kKeyBlock * V::kRows * kBytes;
      prefetch(static_cast<const uint8_t*>(task.keys) + (first_key + kKeyBlock) * task.head_dim * kBytes + part * share,
               N * share);
    }
    float_tile<E, N, T>(w, line, kPanelRows * kBytes, n_keys, weights, kKeyBlock, acc);
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
struct BlockCache {
  PHI4EDGE_INLINE static void prefetch(const KvBlock* block) {
    for (size_t i = 0; i < sizeof(KvBlock); i += 64) __builtin_prefetch(reinterpret_cast<const uint8_t*>(block) + i);
  }

  template <int N, int T>
  PHI4EDGE_INLINE static void add_scores(const AttentionTask& task, int64_t part, const float* queries,
                                         V::Floats (&acc)[N][T]) {
    const int64_t n_blocks = task.value_dim / KvBlock::kDims, panel_bytes = n_blocks * int64_t(sizeof(KvBlock));
    const auto* block = static_cast<const KvBlock*>(task.keys) + part / kParts * n_blocks;
    const auto* values = static_cast<const KvBlock*>(task.values) + part / kParts * n_blocks;
    for (int64_t dim = 0; dim < task.head_dim; dim += KvBlock::kDims, ++block, ++values) {
      if (part % kParts == 0) {
        for (int r = 0; r < N; r += kParts) prefetch(values + r / kParts * n_blocks);
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
  PHI4EDGE_INLINE static void add_values(const AttentionTask& task, int64_t first_key, int n_keys, int part,
                                         const float* weights, V::Floats (&acc)[N][T]) {
    static_assert(KvBlock::kDims % (N * V::kRows) == 0, "the registers of a tile are of one block");
    const int64_t n_blocks = task.value_dim / KvBlock::kDims;
    const int dim = part * V::kRows;
    const auto* block = static_cast<const KvBlock*>(task.values) + first_key / kPanelRows * n_blocks + dim / KvBlock::kDims;
    const auto* next_keys =
        static_cast<const KvBlock*>(task.keys) + (first_key + kKeyBlock) / kPanelRows * n_blocks + dim / KvBlock::kDims;
    for (int key = 0; key < n_keys; key += kPanelRows, block += n_blocks, next_keys += n_blocks) {
      if (dim % KvBlock::kDims == 0) prefetch(next_keys);
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

// Scores of one key block: scores[query][key] = q . k
template <class Cache>
PHI4EDGE_INLINE void key_scores(const AttentionTask& task, int64_t first_key, int n_keys, float* scores) {
  constexpr int R = V::kTileParts;
  const int64_t first_part = first_key / V::kRows;
  const int n_parts = (n_keys + V::kRows - 1) / V::kRows;
  for_token_tiles<V::kTileQueries>(task.n_queries, [&](auto tile, int64_t first) {
    constexpr int T = tile.value;
    const auto run = [&](auto registers, int part) {
      constexpr int N = registers.value;
      typename V::Floats acc[N][T];
      for (int r = 0; r < N; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = V::set1(0.0f);
      }
      Cache::template add_scores<N, T>(task, first_part + part, task.queries + first * task.query_stride, acc);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < N; ++r) V::store(scores + (first + t) * kKeyBlock + (part + r) * V::kRows, acc[r][t]);
      }
    };
    // Several registers at a time only where they start a panel, or are whole panels.
    int part = 0;
    if constexpr (R % kParts == 0) {
      for (; part + R <= n_parts; part += R) run(Index<R>{}, part);
    }
    for (; part < n_parts; ++part) run(Index<1>{}, part);
  });
}

// out[query][dim] += sum over keys of weight[query][key] * value[key][dim]
template <class Cache>
PHI4EDGE_INLINE void add_values(const AttentionTask& task, int64_t first_key, int n_keys, const float* weights, float* out) {
  constexpr int R = V::kTileParts;
  const int n_parts = task.value_dim / V::kRows;
  for_token_tiles<V::kTileQueries>(task.n_queries, [&](auto tile, int64_t first) {
    constexpr int T = tile.value;
    const auto run = [&](auto registers, int part) {
      constexpr int N = registers.value;
      typename V::Floats acc[N][T];
      float* to = out + first * task.value_dim + part * V::kRows;
      for (int r = 0; r < N; ++r) {
        for (int t = 0; t < T; ++t) acc[r][t] = V::load(to + t * task.value_dim + r * V::kRows);
      }
      Cache::template add_values<N, T>(task, first_key, n_keys, part, weights + first * kKeyBlock, acc);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < N; ++r) V::store(to + t * task.value_dim + r * V::kRows, acc[r][t]);
      }
    };
    int part = 0;
    if constexpr (R % kParts == 0) {
      for (; part + R <= n_parts; part += R) run(Index<R>{}, part);
    }
    for (; part < n_parts; ++part) run(Index<1>{}, part);
  });
}

// Softmax with a running maximum (Milakov and Gimelshein, 2018), so that no full row of scores is ever held.
template <class Cache>
void attention(const AttentionTask& task) {
  const int n = task.n_queries;
  auto* scores = static_cast<float*>(task.scratch);  // [query][kKeyBlock]
  float* acc = scores + n * kKeyBlock;               // [query][value_dim]
  float *maximum = acc + n * task.value_dim, *sum = maximum + n;
  constexpr float kNone = -3.0e38f;
  int64_t first = task.first_key[0], last = task.last_key[0];
  for (int i = 0; i < n; ++i) {
    maximum[i] = kNone, sum[i] = 0;
    first = task.first_key[i] < first ? task.first_key[i] : first;
    last = task.last_key[i] > last ? task.last_key[i] : last;
  }
  std::memset(acc, 0, size_t(n) * task.value_dim * sizeof(float));
  for (int64_t key0 = first / kKeyBlock * kKeyBlock; key0 <= last; key0 += kKeyBlock) {
    const int n_keys = int(last - key0 + 1 < kKeyBlock ? last - key0 + 1 : kKeyBlock);
    key_scores<Cache>(task, key0, n_keys, scores);
    for (int i = 0; i < n; ++i) {
      float* s = scores + i * kKeyBlock;
      const int64_t from = task.first_key[i] - key0, to = task.last_key[i] - key0;  // visible: from .. to
      const int padded = (n_keys + V::kRows - 1) / V::kRows * V::kRows;
      for (int64_t k = 0; k < from && k < padded; ++k) s[k] = kNone;
      for (int64_t k = to < 0 ? 0 : to + 1; k < padded; ++k) s[k] = kNone;
      auto m = V::set1(maximum[i]);
      for (int k = 0; k < padded; k += V::kRows) m = V::max(m, V::load(s + k));
      const float new_maximum = V::reduce_max(m);
      if (new_maximum == kNone) {  // nothing visible yet
        std::memset(s, 0, size_t(padded) * sizeof(float));
        continue;
      }
      if (new_maximum > maximum[i]) {
        alignas(64) float lane[V::kRows];
        V::store(lane, exp(V::set1(maximum[i] - new_maximum)));
        const float factor = maximum[i] == kNone ? 0.0f : lane[0];
        sum[i] *= factor;
        float* row = acc + i * task.value_dim;
        for (int d = 0; d < task.value_dim; ++d) row[d] *= factor;
        maximum[i] = new_maximum;
      }
      auto total = V::set1(0.0f);
      for (int k = 0; k < padded; k += V::kRows) {
        const auto p = exp(V::sub(V::load(s + k), V::set1(new_maximum)));
        V::store(s + k, p);
      }
      for (int64_t k = 0; k < from && k < padded; ++k) s[k] = 0;  // exp() does not reach zero
      for (int64_t k = to < 0 ? 0 : to + 1; k < padded; ++k) s[k] = 0;
      for (int k = 0; k < padded; k += V::kRows) total = V::add(total, V::load(s + k));
      sum[i] += V::reduce_sum(total);
    }
    add_values<Cache>(task, key0, n_keys, scores, acc);
  }
  for (int i = 0; i < n; ++i) {
    const float inverse = 1.0f / sum[i];
    for (int d = 0; d < task.head_dim; ++d) task.out[i * task.out_stride + d] = acc[i * task.value_dim + d] * inverse;
  }
}

}  // namespace
}  // namespace phi4edge
