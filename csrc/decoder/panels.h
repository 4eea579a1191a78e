// Weight matrices in panels, and the way there from the tensors of a file.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "base/aligned.h"
#include "base/thread_pool.h"
#include "gguf/gguf.h"
#include "quant/format.h"

namespace phi4edge {

// rows x columns weights in panels of 16 rows; rows are padded with zeros to a multiple of 16.
struct PanelMatrix {
  const Format* format = nullptr;
  int64_t n_rows = 0, n_columns = 0;
  size_t panel_bytes = 0;
  AlignedArray<uint8_t> data;

  int64_t n_panels() const { return (n_rows + kPanelRows - 1) / kPanelRows; }
  size_t n_bytes() const { return size_t(n_panels()) * panel_bytes; }
};

// File bytes done, file bytes in all; returns false to cancel (a CancelledError follows).  Called on the caller's thread only,
// at the start, at the end, and in between about 30 times a second.  May be empty.
using LoadProgress = std::function<bool(uint64_t done, uint64_t total)>;

// A BundleError about one tensor.
[[noreturn]] void fail_tensor(const gguf::File& file, const gguf::Tensor& tensor, const std::string& problem,
                              const std::string& hint);
std::string type_text(const gguf::Tensor& tensor);  // "Q4_K"

// The format of a tensor; BundleError when it is none that we read, with the list of those, or does not fit the size.
const Format& require_format(const gguf::File& file, const gguf::Tensor& tensor);

// A matrix for this tensor, still without memory.
PanelMatrix panels_for(const gguf::File& file, const gguf::Tensor& tensor);

struct PanelLoad {
  const gguf::Tensor* tensor;
  PanelMatrix* matrix;  // of panels_for()
};

enum class Values { kAny, kFinite };  // kFinite: a NaN or an infinity is a BundleError that says where it is

// Allocates and fills all matrices.
void load_panels(const gguf::File& file, std::span<const PanelLoad> loads, Values values, ThreadPool& pool,
                 const LoadProgress& progress);

// Decodes every tensor of the file and throws a BundleError that names the first one with a NaN or an infinity.  For a check
// that the user asks for: it reads the whole file.
void check_finite(const gguf::File& file, ThreadPool& pool, const LoadProgress& progress);

// Position of the first NaN or infinity, or n_values.
int64_t find_not_finite(const float* values, int64_t n_values);

}  // namespace phi4edge
