#include "decoder/multiply.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "decoder/ops.h"
#include "kernels/dispatch.h"

namespace phi4edge {

PanelMatrix pack_matrix(uint32_t type_id, const uint8_t* blocks, size_t n_bytes, int64_t n_rows, int64_t n_columns) {
  const Format* format = find_format(type_id);
  if (!format) throw InputError("no format has the type number " + std::to_string(type_id));
  constexpr int64_t kLargest = int64_t(1) << 31;
  if (n_rows < 1 || n_columns < 1 || n_rows > kLargest || n_columns > kLargest || n_columns % format->block_values != 0 ||
      n_bytes / size_t(n_rows) != format->row_bytes(n_columns) || n_bytes % size_t(n_rows) != 0) {
    throw InputError("a matrix of " + std::to_string(n_rows) + " x " + std::to_string(n_columns) + " " + format->name +
                     " weights does not take " + std::to_string(n_bytes) + " bytes");
  }
  PanelMatrix matrix;
  matrix.format = format;
  matrix.n_rows = n_rows;
  matrix.n_columns = n_columns;
  matrix.panel_bytes = format->panel_bytes(n_columns);
  matrix.data = allocate_aligned<uint8_t>(matrix.n_bytes(), "a matrix");
  for (int64_t row = 0; row < n_rows; row += kPanelRows) {
    format->pack(blocks + size_t(row) * format->row_bytes(n_columns), int(std::min<int64_t>(kPanelRows, n_rows - row)),
                 n_columns, matrix.data.get() + size_t(row / kPanelRows) * matrix.panel_bytes);
  }
  return matrix;
}

void multiply(const PanelMatrix& matrix, const float* x, int64_t n_tokens, float* out, ThreadPool& pool,
              const std::string& isa) {
  const KernelTable& kernels = select_kernels(isa);
  ActivationBuffer activations(n_tokens, matrix.n_columns);
  WorkCounters counters(2, pool.size());
  std::vector<AlignedArray<uint8_t>> scratch;
  for (int thread = 0; thread < pool.size(); ++thread) {
    scratch.push_back(allocate_aligned<uint8_t>(kernels.matmul_scratch_bytes(n_tokens), "scratch"));
  }
  pool.run([&](int thread) {
    Worker worker{thread, pool.size(), pool.barrier(), counters, scratch[size_t(thread)].get()};
    worker.share(n_tokens, 1, [&](int64_t token, int64_t) {
      activations.quantize(x + token * matrix.n_columns, token, n_tokens, matrix.n_columns, activation_scales({&matrix, 1}),
                           kernels);
    });
    worker.wait();
    matmul(worker, kernels, {&matrix, 1}, activations.view(n_tokens, matrix.n_columns, x, matrix.n_columns), out,
           matrix.n_rows);
  });
}

void unpack_row(const PanelMatrix& matrix, int64_t row, float* out, const std::string& isa) {
  if (row < 0 || row >= matrix.n_rows)
    throw InputError("row " + std::to_string(row) + " is not in 0.." + std::to_string(matrix.n_rows - 1));
  const uint8_t* panel = matrix.data.get() + size_t(row / kPanelRows) * matrix.panel_bytes;
  select_kernels(isa).dequantize_row[format_index(*matrix.format)](panel, int(row % kPanelRows), matrix.n_columns, out);
}

}  // namespace phi4edge
