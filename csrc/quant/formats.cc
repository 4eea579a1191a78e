// File blocks to panels, for every format of formats.h.

#include "quant/formats.h"

#include <algorithm>
#include <cstring>

#include "quant/format.h"
#include "quant/panel_layout.h"

namespace phi4edge {
namespace {

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// ---- float formats: [column][16 rows]

template <class F>
void dequantize_values(const void* blocks, int64_t n_values, float* out) {
  const auto* block = static_cast<const uint8_t*>(blocks);
  for (int64_t i = 0; i < n_values; i += F::kValues, block += sizeof(typename F::Block)) {
    typename F::Block aligned;  // file data have no alignment to speak of
    std::memcpy(&aligned, block, sizeof aligned);
    F::dequantize(aligned, out + i);
  }
}

template <class F>
size_t float_panel_bytes(int64_t n_columns) {
  return round_up(size_t(n_columns) * kPanelRows * sizeof(typename F::Block), 64);
}

template <class F>
void pack_floats(const void* rows, int n_rows, int64_t n_columns, uint8_t* panel) {
  constexpr size_t kSize = sizeof(typename F::Block);
  const auto* source = static_cast<const uint8_t*>(rows);
  if (n_rows < kPanelRows) std::memset(panel, 0, float_panel_bytes<F>(n_columns));
  constexpr int64_t kTile = 64;  // columns: the 16 rows of a tile stay in the first-level cache
  for (int64_t begin = 0; begin < n_columns; begin += kTile) {
    const int64_t end = begin + kTile < n_columns ? begin + kTile : n_columns;
    for (int row = 0; row < n_rows; ++row) {
      for (int64_t column = begin; column < end; ++column) {
        std::memcpy(panel + size_t(column * kPanelRows + row) * kSize, source + size_t(row * n_columns + column) * kSize,
                    kSize);
      }
    }
  }
}

// ---- quantised formats

template <class F>
size_t quantized_panel_bytes(int64_t n_columns) {
  return size_t(PanelLayout<F>::n_bytes(n_columns));
}

template <class F>
void pack_blocks(const void* rows, int n_rows, int64_t n_columns, uint8_t* panel) {
  using L = PanelLayout<F>;
  const int64_t n_blocks = n_columns / F::kValues;
  const auto* source = static_cast<const uint8_t*>(rows);
  if (n_rows < kPanelRows) std::memset(panel, 0, quantized_panel_bytes<F>(n_columns));
  for (int64_t first = 0; first < n_blocks; first += L::kBlocks, panel += L::kStride) {
    const int64_t n = std::min(n_blocks - first, L::kBlocks);
    uint8_t* lines = panel + L::scale_bytes(n);
    std::memset(panel + n * F::kScaleBytes, 0, size_t(L::scale_bytes(n) - n * F::kScaleBytes));
    for (int64_t b = 0; b < n; ++b) {
      for (int row = 0; row < n_rows; ++row) {
        typename F::Block block;
        std::memcpy(&block, source + size_t(row * n_blocks + first + b) * sizeof block, sizeof block);
        F::pack_scales(block, row, panel + b * F::kScaleBytes);
        uint8_t codes[F::kValues];
        F::codes(block, codes);
        for (int i = 0; i < F::kValues / 32; ++i) {
          F::Codes::pack(codes + 32 * i, row, lines + b * L::code_bytes(1) + i * L::kLineBytes32);
        }
      }
    }
  }
}

#define X(F)                                                                                            \
  constexpr Format k##F##Format{F::kName, F::kTypeId,           F::kValues,           sizeof(F::Block), \
                                true,     dequantize_values<F>, float_panel_bytes<F>, pack_floats<F>};
PHI4EDGE_FLOAT_FORMATS(X)
#undef X
#define X(F)                                                                                                          \
  constexpr Format k##F##Format{                                                                                      \
      F::kName,      F::kTypeId, F::kValues, sizeof(F::Block), false, dequantize_values<F>, quantized_panel_bytes<F>, \
      pack_blocks<F>};
PHI4EDGE_QUANTIZED_FORMATS(X)
#undef X

constexpr const Format* kFormats[] = {
#define X(F) &k##F##Format,
    PHI4EDGE_FORMATS(X)
#undef X
};

}  // namespace

const Format* find_format(uint32_t type_id) {
  for (const Format* format : kFormats) {
    if (format->type_id == type_id) return format;
  }
  return nullptr;
}

const Format* const* formats(int* count) {
  *count = kFormatCount;
  return kFormats;
}

int format_index(const Format& format) {
  for (int i = 0; i < kFormatCount; ++i) {
    if (kFormats[i] == &format) return i;
  }
  return -1;
}

}  // namespace phi4edge
