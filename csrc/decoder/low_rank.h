// The products of a LowRankUpdate, in two steps of a forward pass with a barrier between:
//   multiply_a   hidden = A x                x is quantised already, for the model's own product
//   add_b        out += scale * B hidden     piece by piece behind that product
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "decoder/adapter.h"
#include "decoder/ops.h"

namespace phi4edge {

// Scratch of one session.
class LowRank {
 public:
  LowRank() = default;
  // For updates of that total rank and number of parts, and inputs of that many columns, at most.
  LowRank(int64_t max_tokens, int64_t max_columns, int64_t max_total_rank, size_t max_parts, int n_threads);

  bool fits(const Adapter& adapter) const;
  // For x, where the adapter has not all of the tokens for which the model's own input was quantised.
  ActivationBuffer& input() { return input_; }

  void multiply_a(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Activations& x);
  // Before add_b().
  void quantize_hidden(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens);
  // out: row 0 of the product
  void add_b(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Piece& piece, int64_t n_tokens,
             double scale, float* out, int64_t out_stride);

 private:
  int64_t max_total_rank_ = 0;
  size_t max_parts_ = 0;
  ActivationBuffer input_;
  AlignedArray<float> hidden_;  // [token][total rank of the update]
  // [thread][part].  Each thread quantises all of `hidden` for itself: that is less work than waiting for the others.
  std::vector<std::vector<ActivationBuffer>> quantized_;
};

}  // namespace phi4edge
