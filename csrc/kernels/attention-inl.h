// Attention of a tile of queries over one KV head.
//
// Part of generic-inl.h, which includes it.
#pragma once

namespace phi4edge {
namespace {

// Calls body(Index<N>, Index<T>, first register, first query) so that tiles cover n_parts registers and all queries.
template <class Body>
PHI4EDGE_INLINE void for_attention_tiles(int n_queries, int n_parts, Body&& body) {
  constexpr int R = V::kTileParts;
  for_token_tiles<V::kTileQueries>(n_queries, [&](auto tile, int64_t query) {
    // Several registers at a time only where they start a panel, or are whole panels.
    int part = 0;
    if constexpr (R % kParts == 0) {
      for (; part + R <= n_parts; part += R) body(Index<R>{}, tile, part, query);
    }
    for (; part < n_parts; ++part) body(Index<1>{}, tile, part, query);
  });
}

// Scores of one key block: rows[query][key] = q . k, to the base 2
template <class Cache>
PHI4EDGE_INLINE void key_scores(const AttentionTask& task, const AttentionWork& work, int64_t first_key, int n_keys) {
  const int64_t first_part = first_key / V::kRows;
  for_attention_tiles(task.n_queries, (n_keys + V::kRows - 1) / V::kRows, [&](auto n, auto tile, int part, int64_t query) {
    constexpr int N = n.value, T = tile.value;
    typename V::Floats score[N][T];
    Cache::template scores<N, T>(task, work, first_part + part, query, score);
    unroll<T>([&](auto t) {  // or GCC keeps them in memory all the time
      float* to = work.rows + (query + t.value) * kKeyBlock + part * V::kRows;
      unroll<N>([&](auto r) { V::store(to + r.value * V::kRows, score[r.value][t.value]); });
    });
  });
}

// sums.values[query][dim] += sum over keys of weight[query][key] * value[key][dim]
template <class Cache>
PHI4EDGE_INLINE void add_values(const AttentionTask& task, const AttentionWork& work, const AttentionSums& sums,
                                int64_t first_key, int n_keys) {
  for_attention_tiles(task.n_queries, task.value_dim / V::kRows, [&](auto n, auto tile, int part, int64_t query) {
    constexpr int N = n.value, T = tile.value;
    typename V::Floats sum[N][T];
    Cache::template values<N, T>(task, work, first_key, n_keys, part, query, sum);
    unroll<T>([&](auto t) {
      float* to = sums.values + (query + t.value) * task.value_dim + part * V::kRows;
      unroll<N>([&](auto r) {
        float* at = to + r.value * V::kRows;
        V::store(at, V::add(V::load(at), sum[r.value][t.value]));
      });
    });
  });
}

// Of a query, which sees some keys of a block: the maximum of scores, and with it what was summed up so far.
PHI4EDGE_INLINE void raise_maximum(const AttentionTask& task, const AttentionWork& work, const AttentionSums& sums,
                                   int64_t key0, int n_keys, int query) {
  const int64_t from = task.first_key[query] - key0, to = task.last_key[query] - key0;
  float* row = work.rows + query * kKeyBlock;
  float& maximum = sums.maximum[query];
  for (int64_t k = 0; k < from && k < n_keys; ++k) row[k] = kHidden;
  for (int64_t k = to < 0 ? 0 : to + 1; k < n_keys; ++k) row[k] = kHidden;
  auto m = V::set1(maximum);
  for (int k = 0; k < n_keys; k += V::kRows) m = V::max(m, V::load(row + k));
  const float new_maximum = V::reduce_max(m);
  if (!(new_maximum > maximum)) return;
  const float factor = maximum == kHidden ? 0.0f : exp2_of_one(maximum - new_maximum);
  sums.weight[query] *= factor;
  float* values = sums.values + query * task.value_dim;
  for (int d = 0; d < task.value_dim; ++d) values[d] *= factor;
  maximum = new_maximum;
}

// Scores to weights; returns their sum.
PHI4EDGE_INLINE float set_weights(const AttentionWork& work, float maximum, int n_keys, int query) {
  float* row = work.rows + query * kKeyBlock;
  const Weights weights(maximum);
  auto total = V::set1(0.0f);
  for (int k = 0; k < n_keys; k += V::kRows) {
    const auto weight = weights.of(V::load(row + k));
    V::store(row + k, weight);
    total = V::add(total, weight);
  }
  return V::reduce_sum(total);
}

// Scores become weights.  Step by step for all queries, which have nothing to wait for then but for themselves.
template <class Cache>
PHI4EDGE_INLINE void weigh_keys(const AttentionTask& task, const AttentionWork& work, const AttentionSums& sums, int64_t key0,
                                int n_keys) {
  const int n_in_panels = (n_keys + kPanelRows - 1) / kPanelRows * kPanelRows;
  for (int i = 0; i < task.n_queries; ++i) raise_maximum(task, work, sums, key0, n_in_panels, i);
  for (int i = 0; i < task.n_queries; ++i) sums.weight[i] += set_weights(work, sums.maximum[i], n_in_panels, i);
  for (int i = 0; i < task.n_queries; ++i) Cache::finish_weights(task, work, key0, n_in_panels, i);
}

// Softmax with a running maximum (Milakov and Gimelshein, 2018), so that no full row of scores is ever held.
// sums: of keys first .. last
template <class Cache>
PHI4EDGE_INLINE void sum_keys(const AttentionTask& task, const AttentionWork& work, const AttentionSums& sums, int64_t first,
                              int64_t last) {
  std::memset(sums.values, 0, size_t(task.n_queries) * task.value_dim * sizeof(float));
  for (int i = 0; i < task.n_queries; ++i) sums.maximum[i] = kHidden, sums.weight[i] = 0;
  for (int64_t key0 = first / kKeyBlock * kKeyBlock; key0 <= last; key0 += kKeyBlock) {
    const int n_keys = int(last - key0 + 1 < kKeyBlock ? last - key0 + 1 : kKeyBlock);
    key_scores<Cache>(task, work, key0, n_keys);
    weigh_keys<Cache>(task, work, sums, key0, n_keys);
    add_values<Cache>(task, work, sums, key0, n_keys);
  }
}

void merge_attention(float* sums, float* other, int n_queries, int value_dim) {
  const AttentionSums to(sums, n_queries, value_dim), from(other, n_queries, value_dim);
  for (int i = 0; i < n_queries; ++i) {
    // A query that sees none of the keys changes nothing, nor does it lose what it saw to rounding.
    const auto saw_nothing = [&](const AttentionSums& s) { return s.maximum[i] == kHidden && s.weight[i] == 0; };
    if (saw_nothing(from)) continue;
    const float maximum = to.maximum[i] > from.maximum[i] ? to.maximum[i] : from.maximum[i];
    const float factor = saw_nothing(to) ? 0.0f : exp2_of_one(to.maximum[i] - maximum);
    const float other_factor = exp2_of_one(from.maximum[i] - maximum);
    to.maximum[i] = maximum;
    to.weight[i] = to.weight[i] * factor + from.weight[i] * other_factor;
    float* values = to.values + int64_t(i) * value_dim;
    const float* added = from.values + int64_t(i) * value_dim;
    for (int d = 0; d < value_dim; d += V::kRows) {
      const auto kept = V::mul(V::load(values + d), V::set1(factor));
      V::store(values + d, V::fma(V::load(added + d), V::set1(other_factor), kept));
    }
  }
}

template <class Cache>
void attention(const AttentionTask& task) {
  static_assert(kKeySegment % kKeyBlock == 0);
  const int n = task.n_queries;
  const AttentionWork work(task);
  int64_t first = task.first_key[0], last = task.last_key[0];
  for (int i = 0; i < n; ++i) {
    first = task.first_key[i] < first ? task.first_key[i] : first;
    last = task.last_key[i] > last ? task.last_key[i] : last;
  }
  Cache::start(task, work);
  for (int64_t segment = task.first_segment; segment < task.end_segment; ++segment) {
    const int64_t begin = segment * kKeySegment, end = begin + kKeySegment - 1;
    float* sums = segment == task.first_segment ? task.sums : work.segment_sums;
    sum_keys<Cache>(task, work, {sums, n, task.value_dim}, first > begin ? first : begin, last < end ? last : end);
    if (sums != task.sums) merge_attention(task.sums, sums, n, task.value_dim);
  }
}

}  // namespace
}  // namespace phi4edge
