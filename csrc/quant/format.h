// What the rest of the program knows of a weight format.  One entry per format; formats.h lists them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace phi4edge {

inline constexpr int kPanelRows = 16;    // rows that lie side by side in a panel
inline constexpr int kSuperBlock = 256;  // values per activation super-block

// n_columns floats (a multiple of the block) to blocks, with the least sum of weight[column] * error^2;
// weights are positive; a null pointer stands for ones.
using QuantizeRow = void (*)(const float* x, const float* weight, int64_t n_columns, uint8_t* out);

struct Format {
  const char* name;  // as GGUF tools spell it: "Q4_K"
  uint32_t type_id;  // ggml type number
  int block_values;  // values per block: 1, 32 or 256
  int block_bytes;
  bool is_float;  // F32, F16, BF16

  // n_values is a multiple of block_values.
  void (*dequantize)(const void* blocks, int64_t n_values, float* out);
  // Bytes of one panel of 16 rows.
  size_t (*panel_bytes)(int64_t n_columns);
  // Packs n_rows (1..16) consecutive rows of file blocks into one panel; missing rows become zero.
  void (*pack)(const void* rows, int n_rows, int64_t n_columns, uint8_t* panel);

  size_t row_bytes(int64_t n_columns) const { return size_t(n_columns / block_values) * size_t(block_bytes); }
};

const Format* find_format(uint32_t type_id);   // nullptr when we do not read that type
const Format* const* formats(int* count);      // all, in the order of formats.h
int format_index(const Format& format);        // place in that order
const char* ggml_type_name(uint32_t type_id);  // also of types we do not read; nullptr when unknown

}  // namespace phi4edge
