// The products of a LowRankUpdate, in three steps of a forward pass with a barrier after each:
//   multiply_a   hidden = A x            x is quantised already, for the model's own product
//   prepare      hidden *= scale, and quantised where B wants it
//   add_b        out += B hidden
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
  // For updates of that total rank at most.
  LowRank(int64_t max_tokens, int64_t max_total_rank);

  int64_t max_total_rank() const { return max_total_rank_; }

  void multiply_a(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Activations& x);
  void prepare(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens, double scale);
  void add_b(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens, float* out,
             int64_t out_stride);

 private:
  static constexpr size_t kMaxParts = 3;  // Q, K and V

  int64_t max_total_rank_ = 0;
  AlignedArray<float> hidden_;               // [token][total rank of the update]
  std::vector<ActivationBuffer> quantized_;  // of each part
};

}  // namespace phi4edge
