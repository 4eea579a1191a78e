// Loading: threads take stretches of about 1 MiB of the file in turn, read them, and repack them into panels.
#include "decoder/panels.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/text.h"

namespace phi4edge {
namespace {

constexpr uint64_t kReadBytes = 1 << 20;
constexpr auto kProgressInterval = std::chrono::milliseconds(33);

// Reports how far we are, from one thread and not too often.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;
  Progress(const LoadProgress& report, uint64_t total) : report_(report), total_(total) {}

  // False: the caller wants to stop.
  bool at(uint64_t done) {
    if (!report_) return true;
    const auto now = Clock::now();
    if (now < next_ && done != total_) return true;
    next_ = now + kProgressInterval;
    return report_(done, total_);
  }

 private:
  const LoadProgress& report_;
  const uint64_t total_;
  Clock::time_point next_{};
};

// Threads take tasks 0, 1, 2, ... in that order.  body(task, scratch) returns the bytes it dealt with; `Scratch` is one per
// thread.  Stops early, with an exception, when a task throws or the caller cancels.
template <class Scratch, class Body>
void run_tasks(ThreadPool& pool, size_t n_tasks, uint64_t total_bytes, const LoadProgress& report, const Body& body) {
  Progress progress(report, total_bytes);
  if (!progress.at(0)) throw CancelledError();
  std::atomic<size_t> next_task{0};
  std::atomic<uint64_t> done_bytes{0};
  std::atomic<bool> stop{false};
  pool.run([&](int thread) {
    try {
      Scratch scratch;
      while (!stop.load(std::memory_order_relaxed)) {
        const size_t task = next_task.fetch_add(1, std::memory_order_relaxed);
        if (task >= n_tasks) break;
        const uint64_t n_bytes = body(task, scratch);
        const uint64_t done = done_bytes.fetch_add(n_bytes, std::memory_order_relaxed) + n_bytes;
        if (thread == 0 && done < total_bytes && !progress.at(done)) throw CancelledError();
      }
    } catch (...) {
      stop.store(true, std::memory_order_relaxed);
      throw;
    }
  });
  if (total_bytes != 0 && !progress.at(total_bytes)) throw CancelledError();
}

// Rows [first_row, first_row + n_rows) of a tensor.
struct Stretch {
  const gguf::Tensor* tensor;
  const Format* format;
  PanelMatrix* matrix;  // where they go; none when only checked
  int64_t first_row, n_rows;

  uint64_t n_bytes() const { return uint64_t(n_rows) * format->row_bytes(tensor->n_columns()); }
};

// Whole panels of at most about kReadBytes, and at least one panel.
void add_stretches(std::vector<Stretch>& stretches, const gguf::Tensor& tensor, const Format& format, PanelMatrix* matrix) {
  const uint64_t panel_file_bytes = std::max<uint64_t>(1, kPanelRows * format.row_bytes(tensor.n_columns()));
  const int64_t step = kPanelRows * int64_t(std::max<uint64_t>(1, kReadBytes / panel_file_bytes));
  for (int64_t row = 0; row < tensor.n_rows(); row += step) {
    stretches.push_back({&tensor, &format, matrix, row, std::min(step, tensor.n_rows() - row)});
  }
}

uint64_t total_bytes(const std::vector<Stretch>& stretches) {
  uint64_t total = 0;
  for (const Stretch& stretch : stretches) total += stretch.n_bytes();
  return total;
}

// Memory that one thread uses again for each stretch.
struct Scratch {
  std::vector<uint8_t> rows;
  std::vector<float> values;
};

void read_rows(const gguf::File& file, const Stretch& stretch, std::vector<uint8_t>& rows) {
  if (rows.size() < stretch.n_bytes()) rows.resize(stretch.n_bytes());
  const uint64_t row_bytes = stretch.format->row_bytes(stretch.tensor->n_columns());
  file.read(*stretch.tensor, uint64_t(stretch.first_row) * row_bytes, stretch.n_bytes(), rows.data());
}

void pack_rows(const Stretch& stretch, const uint8_t* rows) {
  const PanelMatrix& matrix = *stretch.matrix;
  const uint64_t row_bytes = stretch.format->row_bytes(matrix.n_columns);
  for (int64_t row = 0; row < stretch.n_rows; row += kPanelRows) {
    const int n_rows = int(std::min<int64_t>(kPanelRows, stretch.n_rows - row));
    const size_t panel = size_t((stretch.first_row + row) / kPanelRows);
    stretch.format->pack(rows + uint64_t(row) * row_bytes, n_rows, matrix.n_columns,
                         matrix.data.get() + panel * matrix.panel_bytes);
  }
}

// Which value of a stretch's rows is not finite, or -1.
int64_t place_not_finite(const Stretch& stretch, Scratch& scratch) {
  const int64_t n_values = stretch.n_rows * stretch.tensor->n_columns();
  if (scratch.values.size() < size_t(n_values)) scratch.values.resize(size_t(n_values));
  stretch.format->dequantize(scratch.rows.data(), n_values, scratch.values.data());
  const int64_t found = find_not_finite(scratch.values.data(), n_values);
  return found < n_values ? found : -1;
}

[[noreturn]] void fail_not_finite(const gguf::File& file, const Stretch& stretch, int64_t place) {
  const int64_t n_columns = stretch.tensor->n_columns();
  fail_tensor(file, *stretch.tensor,
              text("row ", stretch.first_row + place / n_columns, ", column ", place % n_columns, " is NaN or infinite"),
              "the file is damaged; download or convert it again");
}

}  // namespace

void fail_tensor(const gguf::File& file, const gguf::Tensor& tensor, const std::string& problem, const std::string& hint) {
  throw BundleError(file.paths()[size_t(tensor.shard)], "tensor '" + tensor.name + "'", problem, hint);
}

std::string type_text(const gguf::Tensor& tensor) {
  const char* name = ggml_type_name(tensor.type_id);
  return name ? name : text("type ", tensor.type_id);
}

const Format& require_format(const gguf::File& file, const gguf::Tensor& tensor) {
  const Format* format = find_format(tensor.type_id);
  if (!format) {
    int count = 0;
    const Format* const* all = formats(&count);
    std::string names;
    for (int i = 0; i < count; ++i) names += (i ? ", " : "") + std::string(all[i]->name);
    fail_tensor(file, tensor, text("is stored as ", type_text(tensor), ", which we do not read"),
                "requantize it to one of: " + names);
  }
  // The directory was checked when the file was opened; this guards the reads below against a disagreement about a type.
  if (tensor.n_columns() % format->block_values != 0 ||
      tensor.n_bytes != uint64_t(tensor.n_rows()) * format->row_bytes(tensor.n_columns())) {
    fail_tensor(file, tensor, text("has ", tensor.n_bytes, " bytes, which does not fit ", type_text(tensor)),
                "convert or download the model again");
  }
  return *format;
}

// Position of the first NaN or infinity, or n_values.
int64_t find_not_finite(const float* values, int64_t n_values) {
  // Both have all bits of the exponent set, so they are the largest numbers when the sign is cleared.  As integers the
  // compiler can look at many at once.
  constexpr uint32_t kInfinity = 0x7f800000;
  const auto magnitude = [](float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffff; };
  uint32_t largest = 0;
  for (int64_t i = 0; i < n_values; ++i) largest = std::max(largest, magnitude(values[i]));
  if (largest < kInfinity) return n_values;
  return std::find_if(values, values + n_values, [&](float value) { return magnitude(value) >= kInfinity; }) - values;
}

PanelMatrix panels_for(const gguf::File& file, const gguf::Tensor& tensor) {
  PanelMatrix matrix;
  matrix.format = &require_format(file, tensor);
  matrix.n_rows = tensor.n_rows();
  matrix.n_columns = tensor.n_columns();
  matrix.panel_bytes = matrix.format->panel_bytes(matrix.n_columns);
  return matrix;
}

void load_panels(const gguf::File& file, std::span<const PanelLoad> loads, Values values, ThreadPool& pool,
                 const LoadProgress& progress) {
  std::vector<Stretch> stretches;
  for (const PanelLoad& load : loads) {
    load.matrix->data = allocate_in_large_pages<uint8_t>(load.matrix->n_bytes(), "the weights");
    add_stretches(stretches, *load.tensor, *load.matrix->format, load.matrix);
  }
  run_tasks<Scratch>(pool, stretches.size(), total_bytes(stretches), progress, [&](size_t task, Scratch& scratch) {
    const Stretch& stretch = stretches[task];
    read_rows(file, stretch, scratch.rows);
    if (values == Values::kFinite) {
      if (const int64_t place = place_not_finite(stretch, scratch); place >= 0) fail_not_finite(file, stretch, place);
    }
    pack_rows(stretch, scratch.rows.data());
    return stretch.n_bytes();
  });
}

void check_finite(const gguf::File& file, ThreadPool& pool, const LoadProgress& progress) {
  std::vector<Stretch> stretches;
  for (const gguf::Tensor& tensor : file.tensors()) add_stretches(stretches, tensor, require_format(file, tensor), nullptr);
  // Tasks start in order, so all before the first bad one are finished, and the answer does not depend on timing.
  std::atomic<size_t> first_bad{stretches.size()};
  run_tasks<Scratch>(pool, stretches.size(), total_bytes(stretches), progress, [&](size_t task, Scratch& scratch) {
    size_t known = first_bad.load(std::memory_order_relaxed);
    if (task >= known) return stretches[task].n_bytes();
    read_rows(file, stretches[task], scratch.rows);
    if (place_not_finite(stretches[task], scratch) >= 0) {
      while (task < known && !first_bad.compare_exchange_weak(known, task, std::memory_order_relaxed)) {
      }
    }
    return stretches[task].n_bytes();
  });
  if (first_bad == stretches.size()) return;

  Scratch scratch;
  read_rows(file, stretches[first_bad], scratch.rows);
  fail_not_finite(file, stretches[first_bad], place_not_finite(stretches[first_bad], scratch));
}

}  // namespace phi4edge
