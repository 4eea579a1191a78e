#include "decoder/low_rank.h"

namespace phi4edge {

LowRank::LowRank(int64_t max_tokens, int64_t max_total_rank)
    : max_total_rank_(max_total_rank),
      hidden_(allocate_aligned<float>(size_t(max_tokens) * size_t(max_total_rank), "activations")) {
  for (size_t part = 0; part < kMaxParts; ++part) quantized_.emplace_back(max_tokens, max_total_rank);
}

void LowRank::multiply_a(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, const Activations& x) {
  matmul(worker, kernels, update.a, x, hidden_.get(), update.total_rank());
}

void LowRank::prepare(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens, double scale) {
  const int64_t total_rank = update.total_rank();
  worker.share(n_tokens, 1, [&](int64_t t, int64_t) {
    float* hidden = hidden_.get() + t * total_rank;
    for (size_t part = 0; part < update.parts.size(); ++part) {
      const int64_t rank = update.a[part].n_rows;
      const auto factor = float(scale * update.parts[part].scale);
      for (int64_t i = 0; i < rank; ++i) hidden[i] *= factor;
      if (!update.b[part].format->is_float) quantized_[part].quantize(hidden, t, n_tokens, rank, kernels);
      hidden += rank;
    }
  });
}

void LowRank::add_b(Worker& worker, const KernelTable& kernels, const LowRankUpdate& update, int64_t n_tokens, float* out,
                    int64_t out_stride) {
  const int64_t total_rank = update.total_rank();
  const float* hidden = hidden_.get();
  for (size_t part = 0; part < update.parts.size(); ++part) {
    const int64_t rank = update.a[part].n_rows;
    matmul(worker, kernels, {&update.b[part], 1}, quantized_[part].view(n_tokens, rank, hidden, total_rank),
           out + update.parts[part].first_row, out_stride, Store::kAdd);
    hidden += rank;
  }
}

}  // namespace phi4edge
