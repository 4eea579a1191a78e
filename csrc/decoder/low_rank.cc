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

void LowRank::quantize_hidden(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens) {
  const int64_t total_rank = update.total_rank();
  const float* hidden = hidden_.get();
  for (size_t part = 0; part < update.parts.size(); ++part) {
    const int64_t rank = update.a[part].n_rows;
    const ActivationScales scales = activation_scales({&update.b[part], 1});
    for (int64_t t = 0; t < n_tokens && scales; ++t) {
      quantized_[size_t(worker.thread)][part].quantize(hidden + t * total_rank, t, n_tokens, rank, scales, kernels);
    }
    hidden += rank;
  }
}

void LowRank::add_b(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Piece& piece,
                    int64_t n_tokens, double scale, float* out, int64_t out_stride) {
  const float* hidden = hidden_.get();
  for (size_t part = 0; part < update.parts.size(); ++part) {
    const LowRankUpdate::Part& target = update.parts[part];
    const int64_t rank = update.a[part].n_rows;
    if (target.matrix == piece.matrix) {
      const Activations x = quantized_[size_t(worker.thread)][part].view(n_tokens, rank, hidden, update.total_rank());
      add_product(worker, kernels, update.b[part], piece.begin, piece.end, x, float(scale * target.scale),
                  out + target.first_row, out_stride);
    }
    hidden += rank;
  }
}

}  // namespace phi4edge
