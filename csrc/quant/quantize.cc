#include "quant/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "base/error.h"
#include "quant/formats.h"

namespace phi4edge {
namespace {

Half to_finite_half(float value) { return float_to_half(std::clamp(value, -65504.0f, 65504.0f)); }

// Rounds to nearest, ties to even; what would round to infinity stays the largest finite number.
BFloat float_to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return BFloat((rounded & 0x7fff) == 0x7f80 ? rounded - 1 : rounded);
}

// Float formats.
template <class F>
void convert_row(const float* x, const float*, int64_t n_columns, uint8_t* out) {
  for (int64_t i = 0; i < n_columns; ++i, out += sizeof(typename F::Block)) {
    typename F::Block value;
    if constexpr (std::is_same_v<F, F32>) {
      value = x[i];
    } else if constexpr (std::is_same_v<F, F16>) {
      value = to_finite_half(x[i]);
    } else {
      value = float_to_bfloat(x[i]);
    }
    std::memcpy(out, &value, sizeof value);
  }
}

constexpr QuantizeRow kConvertRow[] = {
#define X(F) convert_row<F>,
    PHI4EDGE_FLOAT_FORMATS(X)
#undef X
};

bool all_finite(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
  return largest < 0x7f800000;
}

// Importance to weights: the largest of each 256 columns becomes 1, and none is quite zero.
std::vector<float> to_weights(const float* importance, int64_t n_columns) {
  std::vector<float> weights(size_t(n_columns), 1.0f);
  for (int64_t i = 0; i < n_columns; ++i) {
    if (!std::isfinite(importance[i]) || importance[i] < 0) {
      throw InputError("the importance of column " + std::to_string(i) + " is negative or not finite");
    }
  }
  for (int64_t begin = 0; begin < n_columns; begin += 256) {
    const int64_t end = std::min(begin + 256, n_columns);
    const float largest = *std::max_element(importance + begin, importance + end);
    if (largest == 0) continue;
    for (int64_t i = begin; i < end; ++i) weights[size_t(i)] = std::max(importance[i] / largest, 1e-9f);
  }
  return weights;
}

}  // namespace

void quantize_rows(const Format& format, QuantizeRow quantize_row, const float* rows, int64_t n_rows, int64_t n_columns,
                   const float* importance, uint8_t* out, ThreadPool& pool) {
  if (n_columns % format.block_values != 0) {
    throw InputError("rows of " + std::to_string(n_columns) + " values do not fit " + format.name + ", which has blocks of " +
                     std::to_string(format.block_values));
  }
  const std::vector<float> weights = importance ? to_weights(importance, n_columns) : std::vector<float>();
  const float* weight = importance ? weights.data() : nullptr;
  const QuantizeRow quantize = format.is_float ? kConvertRow[format_index(format)] : quantize_row;
  const size_t row_bytes = format.row_bytes(n_columns);
  std::atomic<int64_t> next{0}, first_bad{n_rows};
  pool.run([&](int) {
    for (int64_t row = next++; row < first_bad; row = next++) {  // rows before the first bad one are always looked at
      const float* x = rows + row * n_columns;
      if (all_finite(x, n_columns)) {
        quantize(x, weight, n_columns, out + size_t(row) * row_bytes);
        continue;
      }
      int64_t known = first_bad;
      while (row < known && !first_bad.compare_exchange_weak(known, row)) {
      }
    }
  });
  if (first_bad < n_rows) throw InputError("row " + std::to_string(first_bad) + " has a NaN or an infinity");
}

}  // namespace phi4edge
