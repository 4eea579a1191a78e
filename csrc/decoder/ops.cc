#include "decoder/ops.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "base/error.h"

namespace phi4edge {
namespace {

int64_t super_blocks(int64_t n_columns) { return (n_columns + kSuperBlock - 1) / kSuperBlock; }
size_t scales_of(int kind) { return kind == int(ActivationScale::kFor256) ? 1 : kSuperBlock / 32; }

}  // namespace

ActivationScales activation_scales(std::span<const PanelMatrix> matrices) {
  ActivationScales scales = 0;
  for (const PanelMatrix& matrix : matrices) {
    if (matrix.format->is_float) continue;
    scales |= 1u << int(matrix.format->block_values == kSuperBlock ? ActivationScale::kFor256 : ActivationScale::kFor32);
  }
  return scales;
}

ActivationBuffer::ActivationBuffer(int64_t max_tokens, int64_t max_columns) {
  const size_t n = size_t(max_tokens) * size_t(super_blocks(max_columns));
  for (int kind = 0; kind < kActivationScaleCount; ++kind) {
    Arrays& arrays = arrays_[kind];
    arrays.codes = allocate_aligned<int8_t>(n * kSuperBlock, "activations");
    arrays.scales = allocate_aligned<float>(n * scales_of(kind), "activations");
    arrays.shifts = allocate_aligned<int32_t>(n * 16, "activations");
    arrays.neg_sums = allocate_aligned<int32_t>(n * 16, "activations");
    if (kind == int(ActivationScale::kFor256)) {
      arrays.sum_digits = allocate_aligned<int8_t>(n * QuantizedActivations::kDigits, "activations");
    } else {
      arrays.neg_sums32 = allocate_aligned<float>(n * 8, "activations");
    }
  }
}

QuantizedActivations ActivationBuffer::at(int kind, int64_t at) const {
  const Arrays& arrays = arrays_[kind];
  QuantizedActivations x;
  x.codes = arrays.codes.get() + at * kSuperBlock;
  x.scales = arrays.scales.get() + at * int64_t(scales_of(kind));
  x.shifts = arrays.shifts.get() + at * 16;
  x.neg_sums = arrays.neg_sums.get() + at * 16;
  if (kind == int(ActivationScale::kFor256)) {
    x.sum_digits = arrays.sum_digits.get() + at * QuantizedActivations::kDigits;
  } else {
    x.neg_sums32 = arrays.neg_sums32.get() + at * 8;
  }
  return x;
}

void ActivationBuffer::quantize(const float* x, int64_t at, int64_t n_tokens, int64_t n_columns, ActivationScales scales,
                                const KernelTable& kernels) {
  for (int kind = 0; kind < kActivationScaleCount; ++kind) {
    if (scales >> kind & 1) kernels.quantize[kind](x, n_columns, n_tokens, this->at(kind, at));
  }
}

Activations ActivationBuffer::view(int64_t n_tokens, int64_t n_columns, const float* values, int64_t value_stride) const {
  Activations x;
  x.n_tokens = n_tokens;
  x.n_columns = n_columns;
  for (int kind = 0; kind < kActivationScaleCount; ++kind) x.quantized[kind] = at(kind, 0);
  x.values = values;
  x.value_stride = value_stride;
  return x;
}

namespace {

void require_inputs(const PanelMatrix& matrix, const Activations& x) {
  if (x.n_columns == matrix.n_columns) return;
  throw InputError("matmul: expected " + std::to_string(matrix.n_columns) + " inputs, got " + std::to_string(x.n_columns));
}

// out: row 0 of the matrix
void multiply_panels(Worker& worker, const KernelTable& kernels, const PanelMatrix& matrix, int64_t begin, int64_t end,
                     const Activations& x, float* out, int64_t out_stride, bool adds, float factor) {
  const int64_t row = begin * kPanelRows;
  const auto kernel = kernels.matmul[format_index(*matrix.format)];
  kernel({matrix.data.get() + size_t(begin) * matrix.panel_bytes, matrix.panel_bytes,
          std::min(end * kPanelRows, matrix.n_rows) - row, matrix.n_columns, &x, out + row, out_stride, adds, factor,
          worker.scratch});
}

// Pieces of about 200 KB, but enough of them that the threads finish together; an even number of panels.
int64_t piece_panels(const PanelMatrix& matrix, int n_threads) {
  const int64_t by_size = std::max<int64_t>(1, int64_t((200 << 10) / matrix.panel_bytes));
  const int64_t by_share = std::max<int64_t>(1, matrix.n_panels() / (4 * n_threads));
  return (std::min(by_size, by_share) + 1) / 2 * 2;
}

}  // namespace

void matmul(Worker& worker, const KernelTable& kernels, std::span<const PanelMatrix> matrices, const Activations& x, float* out,
            int64_t out_stride, const PieceDone& piece_done) {
  for (size_t i = 0; i < matrices.size(); ++i) {
    const PanelMatrix& matrix = matrices[i];
    require_inputs(matrix, x);
    worker.share_stretches(matrix.n_panels(), piece_panels(matrix, worker.n_threads), [&](int64_t begin, int64_t end) {
      multiply_panels(worker, kernels, matrix, begin, end, x, out, out_stride, false, 0.0f);
      if (piece_done) piece_done({i, begin, end});
    });
    out += matrix.n_rows;
  }
}

void add_product(Worker& worker, const KernelTable& kernels, const PanelMatrix& matrix, int64_t begin, int64_t end,
                 const Activations& x, float factor, float* out, int64_t out_stride) {
  require_inputs(matrix, x);
  multiply_panels(worker, kernels, matrix, begin, end, x, out, out_stride, true, factor);
}

void rope_angles(const RopeConfig& rope, bool use_long_factors, int64_t position, float* cosine, float* sine) {
  const std::vector<float>& factors = use_long_factors ? rope.factors_long : rope.factors_short;
  for (int64_t i = 0; i < rope.n_dims / 2; ++i) {
    const double factor = factors.empty() ? 1.0 : double(factors[size_t(i)]);
    // In float, like the reference: frequency, then its product with the position.
    const float frequency = float(rope.position_scale / (factor * std::pow(rope.base, 2.0 * double(i) / double(rope.n_dims))));
    const float angle = float(position) * frequency;
    cosine[i] = std::cos(angle) * rope.attention_factor;
    sine[i] = std::sin(angle) * rope.attention_factor;
  }
}

void rotate(const RopeConfig& rope, const float* cosine, const float* sine, float* head) {
  const int64_t half = rope.n_dims / 2;
  const int64_t step = rope.interleaved ? 2 : 1, other = rope.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i * step], b = head[i * step + other];
    head[i * step] = a * cosine[i] - b * sine[i];
    head[i * step + other] = b * cosine[i] + a * sine[i];
  }
}

}  // namespace phi4edge
