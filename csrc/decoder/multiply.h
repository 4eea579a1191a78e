// One matrix product outside a decoder, for tests and benchmarks of the kernels.
#pragma once

#include <cstdint>
#include <string>

#include "base/thread_pool.h"
#include "decoder/weights.h"

namespace phi4edge {

// Packs rows x columns file blocks.  Throws InputError when the shape does not fit the format.
PanelMatrix pack_matrix(uint32_t type_id, const uint8_t* blocks, size_t n_bytes, int64_t n_rows, int64_t n_columns);

// out[token][row] = sum over columns of weights[row][column] * x[token][column], with the activations quantised when the
// weights are.
void multiply(const PanelMatrix& matrix, const float* x, int64_t n_tokens, float* out, ThreadPool& pool,
              const std::string& isa);

// Row `row` of the packed matrix as floats.
void unpack_row(const PanelMatrix& matrix, int64_t row, float* out, const std::string& isa);

}  // namespace phi4edge
