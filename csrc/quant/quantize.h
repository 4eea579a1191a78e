// Floats to the blocks of every weight format.
//
// Codes and scales are searched for the smallest sum of importance[column] * error^2 of each block; without importance, of
// error^2.  The result depends on the row alone: not on its neighbours, nor on the number of threads.
#pragma once

#include <cstdint>

#include "base/thread_pool.h"
#include "quant/format.h"

namespace phi4edge {

// `quantize_row` is the kernel of a quantized format; float formats need none.
// rows [n_rows][n_columns] to out [n_rows][format.row_bytes(n_columns)].  importance [n_columns] or nullptr.
// Throws InputError: n_columns is no multiple of the block, a value is not finite (names the row), or an importance is
// negative or not finite.  What a format cannot hold becomes its largest finite number.
void quantize_rows(const Format& format, QuantizeRow quantize_row, const float* rows, int64_t n_rows, int64_t n_columns,
                   const float* importance, uint8_t* out, ThreadPool& pool);

}  // namespace phi4edge
