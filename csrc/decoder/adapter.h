// LoRA adapters: for some of a model's products, y += scale * alpha / rank * B (A x), beside the model's own weights.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "decoder/config.h"
#include "decoder/ops.h"
#include "decoder/panels.h"
#include "gguf/gguf.h"

namespace phi4edge {

class Model;

// What an adapter adds to one product.  Matrices that are stacked in the product may have a pair each.
struct LowRankUpdate {
  struct Part {
    size_t matrix;      // of the product's, which `b` has the rows of
    int64_t first_row;  // of that matrix among the product's stacked rows
    double scale;       // alpha / rank
  };
  std::vector<PanelMatrix> a;  // [rank][n_columns]
  std::vector<PanelMatrix> b;  // [n_rows][rank]
  std::vector<Part> parts;     // of each pair

  int64_t total_rank() const;
};

// Read-only after construction; any number of sessions of its model may use it.
class Adapter {
 public:
  // Throws BundleError (not an adapter, made for another base, a damaged or missing tensor, NaN or infinity),
  // OutOfMemoryError (before anything is allocated), CancelledError.  The model is unaffected.
  Adapter(std::shared_ptr<Model> model, const gguf::File& file, uint64_t available_memory, const LoadProgress& progress);

  const Model& model() const { return *model_; }
  uint64_t id() const { return id_; }  // no other adapter of this process has it, and none has 0
  // nullptr when the adapter leaves this product alone.
  const LowRankUpdate* update(int64_t layer, Product product) const;

  int64_t max_total_rank() const { return max_total_rank_; }  // of all updates
  size_t max_parts() const { return max_parts_; }
  double max_scale() const { return max_scale_; }  // the largest alpha / rank
  size_t n_bytes() const { return n_bytes_; }
  ActivationScales activation_scales() const { return activation_scales_; }  // of the inputs of all updates

 private:
  std::shared_ptr<Model> model_;
  uint64_t id_;
  std::vector<LowRankUpdate> updates_;  // [layer][product]
  int64_t max_total_rank_ = 0;
  size_t max_parts_ = 0;
  double max_scale_ = 0.0;
  size_t n_bytes_ = 0;
  ActivationScales activation_scales_ = 0;
};

}  // namespace phi4edge
