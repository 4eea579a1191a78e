#include "decoder/low_rank.h"

namespace phi4edge {

LowRank::LowRank(int64_t max_tokens, int64_t max_columns, int64_t max_total_rank, size_t max_parts, int n_threads)
    : max_total_rank_(max_total_rank),
      max_parts_(max_parts),
      input_(max_tokens, max_columns),
      hidden_(allocate_aligned<float>(size_t(max_tokens) * size_t(max_total_rank), "activations")),
      quantized_(size_t(n_threads)) {
  for (auto& parts : quantized_) {
    for (size_t part = 0; part < max_parts; ++part) parts.emplace_back(max_tokens, max_total_rank);
  }
}

bool LowRank::fits(const Adapter& adapter) const {
  return adapter.max_total_rank() <= max_total_rank_ && adapter.max_parts() <= max_parts_;
}

void LowRank::multiply_a(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Activations& x) {
  matmul(worker, kernels, update.a, x, hidden_.get(), update.total_rank());
}

void LowRank::add_b(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens, double scale,
                    float* out, int64_t out_stride) {
  const int64_t total_rank = update.total_rank();
  const float* hidden = hidden_.get();
  for (size_t part = 0; part < update.parts.size(); ++part) {
    const int64_t rank = update.a[part].n_rows;
    ActivationBuffer& quantized = quantized_[size_t(worker.thread)][part];
    const ActivationScales scales = activation_scales({&update.b[part], 1});
    for (int64_t t = 0; t < n_tokens && scales; ++t) {
      quantized.quantize(hidden + t * total_rank, t, n_tokens, rank, scales, kernels);
    }
    add_product(worker, kernels, update.b[part], quantized.view(n_tokens, rank, hidden, total_rank),
                float(scale * update.parts[part].scale), out + update.parts[part].first_row, out_stride);
    hidden += rank;
  }
}

}  // namespace phi4edge
