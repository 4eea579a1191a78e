// The attention of a forward pass.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder/forward.h"

namespace phi4edge {

int64_t Forward::first_key(int64_t position) const {
  return config_.sliding_window > 0 ? std::max<int64_t>(0, position - config_.sliding_window + 1) : 0;
}

void Forward::add_tiles(const Slice& slice, int64_t first_row) {
  for (int64_t i = 0; i < slice.n; i += kQueryTokens) {
    const int64_t position = slice.first + i, n = std::min(kQueryTokens, slice.n - i);
    const int64_t first_segment = first_key(position) / kKeySegment, end_segment = (position + n - 1) / kKeySegment + 1;
    tiles_.push_back({&slice, first_row + i, position, n, first_segment, end_segment});
    n_segments_ = std::max(n_segments_, end_segment - first_segment);
  }
}

// Queries are rotated, scaled and spread in place.  By KV heads, so that the threads share the work of a single row too.
void Forward::store_keys_and_values(Worker& worker, int64_t layer) {
  const ModelConfig& c = config_;
  const int64_t half = c.rope.n_dims / 2, n_heads = c.n_kv_heads;
  const float scale = 1.0f / std::sqrt(float(c.head_dim));
  worker.share(n_rows() * n_heads, n_rows() > 1 ? n_heads : 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / n_heads, kv_head = item % n_heads;
      const auto& [slice, group, position] = rows_[size_t(row)];
      const float *cosine = cosine_.data() + row * half, *sine = sine_.data() + row * half;
      float* of_row = scratch_.qkv.get() + row * (q_dim_ + 2 * kv_dim_);
      for (int64_t i = 0; i < queries_per_key_; ++i) {
        float* query = of_row + (kv_head * queries_per_key_ + i) * c.head_dim;
        rotate(c.rope, cosine, sine, query);
        for (int64_t d = 0; d < c.head_dim; ++d) query[d] *= scale;
        slice->cache->spread(query);
      }
      float *key = of_row + q_dim_ + kv_head * c.head_dim, *value = key + kv_dim_;
      rotate(c.rope, cosine, sine, key);
      slice->cache->store(layer, kv_head, position, key, value, kernels_);
    }
  });
}

void Forward::attend(Worker& worker, int64_t layer) {
  if (!segment_sums_.empty()) return attend_by_segments(worker, layer);
  const auto n_tiles = int64_t(tiles_.size());
  // Head by head: the keys and values of one stay in the cache while all tiles go over them.
  worker.share(config_.n_kv_heads * n_tiles, 1, [&](int64_t item, int64_t) {
    const Tile& tile = tiles_[size_t(item % n_tiles)];
    auto* sums = static_cast<float*>(worker.scratch);
    sum_attention(worker, layer, tile, item / n_tiles, tile.first_segment, tile.end_segment, sums);
    finish_attention(tile, item / n_tiles, sums);
  });
}

// Few rows, many keys: threads share a head by its segments, so that they end together however many there are.
void Forward::attend_by_segments(Worker& worker, int64_t layer) {
  const auto n_tiles = int64_t(tiles_.size());
  const int64_t n_heads = config_.n_kv_heads;
  const auto sums_of = [&](int64_t head_of_tile, int64_t i) {
    return segment_sums_.data() + (head_of_tile * n_segments_ + i) * sums_stride_;
  };
  worker.share_stretches(n_tiles * n_heads * n_segments_, 1, [&](int64_t item, int64_t) {
    const int64_t head_of_tile = item / n_segments_, i = item % n_segments_;
    const Tile& tile = tiles_[size_t(head_of_tile / n_heads)];
    const int64_t segment = tile.first_segment + i;
    if (segment >= tile.end_segment) return;
    sum_attention(worker, layer, tile, head_of_tile % n_heads, segment, segment + 1, sums_of(head_of_tile, i));
  });
  worker.done(Operation::kAttention);
  worker.wait();
  worker.share(n_tiles * n_heads, 1, [&](int64_t item, int64_t) {
    const Tile& tile = tiles_[size_t(item / n_heads)];
    float* sums = sums_of(item, 0);
    for (int64_t i = 1; i < tile.end_segment - tile.first_segment; ++i) {
      kernels_.merge_attention(sums, sums_of(item, i), int(tile.n * queries_per_key_), int(tile.slice->cache->value_dim()));
    }
    finish_attention(tile, item % n_heads, sums);
  });
}

// The thread's scratch begins with room for such sums.
void Forward::sum_attention(Worker& worker, int64_t layer, const Tile& tile, int64_t kv_head, int64_t first_segment,
                            int64_t end_segment, float* sums) {
  const KvCache& cache = *tile.slice->cache;
  const int64_t head_dim = config_.head_dim, stride = q_dim_ + 2 * kv_dim_;
  // And then: the queries of a tile side by side, the keys they see, and the kernel's own.
  const int64_t max_queries = kQueryTokens * queries_per_key_, n_queries = tile.n * queries_per_key_;
  float* queries = static_cast<float*>(worker.scratch) + sums_stride_;
  auto* first_keys = reinterpret_cast<int64_t*>(queries + round_up16(max_queries * head_dim));
  int64_t* last_keys = first_keys + round_up16(max_queries);
  static_assert(sizeof(int64_t) * 16 % kCacheLine == 0);
  for (int64_t i = 0; i < n_queries; ++i) {
    const int64_t t = i / queries_per_key_, head = kv_head * queries_per_key_ + i % queries_per_key_;
    std::memcpy(queries + i * head_dim, scratch_.qkv.get() + (tile.row + t) * stride + head * head_dim,
                size_t(head_dim) * sizeof(float));
    last_keys[i] = tile.position + t;
    first_keys[i] = first_key(last_keys[i]);
  }
  kernels_.attention[int(cache.type())]({queries, head_dim, int(n_queries), first_keys, last_keys, int(head_dim),
                                         int(cache.value_dim()), cache.keys(layer, kv_head), cache.values(layer, kv_head),
                                         first_segment, end_segment, sums, last_keys + round_up16(max_queries)});
}

void Forward::finish_attention(const Tile& tile, int64_t kv_head, float* sums) {
  const KvCache& cache = *tile.slice->cache;
  const int64_t head_dim = config_.head_dim, n_queries = tile.n * queries_per_key_;
  const AttentionSums all(sums, n_queries, cache.value_dim());
  for (int64_t i = 0; i < n_queries; ++i) {
    const int64_t row = tile.row + i / queries_per_key_, head = kv_head * queries_per_key_ + i % queries_per_key_;
    const float* values = all.values + i * cache.value_dim();
    float* out = scratch_.attention.get() + row * q_dim_ + head * head_dim;
    const float inverse = 1.0f / all.weight[i];
    for (int64_t d = 0; d < head_dim; ++d) out[d] = values[d] * inverse;
    cache.spread(out);
  }
}

}  // namespace phi4edge
