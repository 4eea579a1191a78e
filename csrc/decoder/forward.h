// A forward pass: rows of one sequence, or of several, which read every weight together.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "decoder/adapter.h"
#include "decoder/config.h"
#include "decoder/input_squares.h"
#include "decoder/kv_cache.h"
#include "decoder/low_rank.h"
#include "decoder/ops.h"
#include "decoder/profile.h"
#include "decoder/scratch.h"
#include "decoder/watch.h"

namespace phi4edge {

class Model;

// A token id, or -1 - r for row r of the embedding rows of its sequence.
using Input = int64_t;

// Positions first .. first + n - 1 of a sequence, whose keys and values are in its cache up to there; n is 1 or more.
struct Slice {
  KvCache* cache;
  const Input* inputs;  // of these positions
  const float* embedding_rows;
  int64_t first, n;
  int64_t n_logits;  // the last positions, whose logits are wanted
  bool long_factors;
  const Adapter* adapter;  // nullptr: none
  double scale;
  LowRank* low_rank;      // that the adapter fits
  InputSquares* squares;  // nullptr: none
  int64_t n_squares;      // the last positions, which are added to them
};

// One pass through all layers.  What comes out for a row does not depend on the rows beside it, to the bit.
class Forward {
 public:
  // kMaxRows rows or fewer in all; slices with the same adapter and scale are neighbours.
  Forward(Model& model, std::vector<Slice> slices);

  int64_t n_rows() const { return int64_t(rows_.size()); }
  int64_t vocab_size() const { return config_.vocab_size; }
  int64_t n_logits() const { return int64_t(head_rows_.size()); }
  // Logits, n_logits() rows of vocab_size floats in the order of the slices, go to `logits`.
  // Throws what the watch throws; then the caches are as before, but for these positions.
  // profile may be null; its begin_pass() was called.
  void run(float* logits, Watch& watch, Profile* profile);

 private:
  // Neighbours with the same adapter and scale.
  struct Group {
    const Adapter* adapter;
    double scale;
    LowRank* low_rank;
    int64_t first_row, n_rows;
  };
  struct Row {
    const Slice* slice;
    size_t group;
    int64_t position;
  };
  // Rows of a slice whose queries meet a KV head together.
  struct Tile {
    const Slice* slice;
    int64_t row, position, n;
    int64_t first_segment, end_segment;  // that they see, of kKeySegment keys each
  };

  void add_rows(const Slice& slice);
  void add_tiles(const Slice& slice, int64_t first_row);
  int64_t first_key(int64_t position) const;
  size_t n_loops() const;
  void add_work(Profile& profile) const;
  bool run_layer(Worker& worker, int64_t layer, Watch& watch);  // false: told to stop
  void project(Worker& worker, int64_t layer, Product product, const float* x, float* out, int64_t out_stride);
  void add_squares(Worker& worker, int64_t layer, Product product, const float* x, int64_t n_columns);
  void run_head(Worker& worker, float* logits);
  void embed(Worker& worker);
  void normalize(Worker& worker, const float* add, const std::vector<float>& weight);
  void normalize_row(int64_t row, const float* add, const std::vector<float>& weight, float* out);
  void store_keys_and_values(Worker& worker, int64_t layer);
  void attend(Worker& worker, int64_t layer);
  void attend_by_segments(Worker& worker, int64_t layer);
  void sum_attention(Worker& worker, int64_t layer, const Tile& tile, int64_t kv_head, int64_t first_segment,
                     int64_t end_segment, float* sums);
  void finish_attention(const Tile& tile, int64_t kv_head, float* sums);
  void multiply_gate(Worker& worker);
  void quantize(const float* x, int64_t row, int64_t super_block, int64_t n_columns);
  bool alone(const Group& group) const { return group.n_rows == n_rows(); }

  Model& model_;
  const ModelConfig& config_;
  const KernelTable& kernels_;
  Scratch& scratch_;
  const int64_t q_dim_, kv_dim_, queries_per_key_, sums_stride_;
  int64_t n_segments_ = 1;  // of the tile that sees most of them
  const std::vector<Slice> slices_;
  std::vector<Group> groups_;
  std::vector<Row> rows_;
  std::vector<Tile> tiles_;           // those that see most keys first
  std::vector<float> segment_sums_;   // AttentionSums of [tile][kv_head][segment], where threads share heads by segments
  std::vector<int64_t> head_rows_;    // whose logits are wanted
  std::vector<float> cosine_, sine_;  // [row][n_dims / 2]
  WorkCounters counters_;
  ActivationScales scales_;  // that the weights and all adapters want
  std::atomic<bool> stop_{false};
};

}  // namespace phi4edge
