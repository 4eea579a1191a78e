#include "decoder/kernel_speed.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "base/aligned.h"
#include "base/error.h"
#include "base/text.h"
#include "decoder/ops.h"
#include "kernels/dispatch.h"

namespace phi4edge {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPeakRounds = 8;           // of kMaxPeakSteps in a pass: milliseconds, so that waking the threads does not count
constexpr int64_t kMaxRepeats = 100000;  // one counter each
constexpr int64_t kMaxCopies = 4096;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

PanelMatrix copy_of(const PanelMatrix& matrix) {
  PanelMatrix copy;
  copy.format = matrix.format;
  copy.n_rows = matrix.n_rows;
  copy.n_columns = matrix.n_columns;
  copy.panel_bytes = matrix.panel_bytes;
  copy.data = allocate_in_large_pages<uint8_t>(matrix.n_bytes(), "copies of a matrix");
  std::memcpy(copy.data.get(), matrix.data.get(), matrix.n_bytes());
  return copy;
}

}  // namespace

double int8_peak(const std::string& isa, int n_threads, double seconds) {
  if (n_threads < 1 || !(seconds > 0 && seconds <= 60)) {
    throw InputError("int8_peak: wants 1 or more threads, and up to 60 seconds");
  }
  const KernelTable& kernels = select_kernels(isa);
  ThreadPool pool(n_threads);
  std::vector<int64_t> n_done(size_t(n_threads), 0);
  double best = 0;
  for (const auto start = Clock::now(); seconds_since(start) < seconds;) {
    const auto begin = Clock::now();
    pool.run([&](int thread) {
      int64_t n = 0;
      for (int round = 0; round < kPeakRounds; ++round) n += kernels.repeat_dots(kMaxPeakSteps);
      n_done[size_t(thread)] = n;
    });
    const double elapsed = seconds_since(begin);
    int64_t n_operations = 0;
    for (const int64_t n : n_done) n_operations += n;
    best = std::max(best, double(n_operations) / elapsed);
  }
  return best;
}

std::vector<double> time_multiply(const PanelMatrix& matrix, const float* x, int64_t n_tokens, int64_t n_repeats,
                                  int64_t n_copies, ThreadPool& pool, const std::string& isa) {
  if (n_tokens < 1 || n_repeats < 1 || n_repeats > kMaxRepeats || n_copies < 1 || n_copies > kMaxCopies) {
    throw InputError(text("time_multiply: wants 1 or more tokens, 1 to ", kMaxRepeats, " repeats and 1 to ", kMaxCopies,
                          " copies, got ", n_tokens, ", ", n_repeats, " and ", n_copies));
  }
  const KernelTable& kernels = select_kernels(isa);
  std::vector<PanelMatrix> copies;
  for (int64_t i = 0; i < n_copies; ++i) copies.push_back(copy_of(matrix));
  ActivationBuffer activations(n_tokens, matrix.n_columns);
  for (int64_t token = 0; token < n_tokens; ++token) {
    activations.quantize(x + token * matrix.n_columns, token, n_tokens, matrix.n_columns, activation_scales({&matrix, 1}),
                         kernels);
  }
  const Activations input = activations.view(n_tokens, matrix.n_columns, x, matrix.n_columns);
  const auto out = allocate_aligned<float>(size_t(n_tokens) * size_t(matrix.n_rows), "the products");
  std::vector<AlignedArray<uint8_t>> scratch;
  for (int thread = 0; thread < pool.size(); ++thread) {
    scratch.push_back(allocate_aligned<uint8_t>(kernels.matmul_scratch_bytes(n_tokens), "scratch"));
  }
  WorkCounters counters(size_t(n_repeats + 1), pool.size());
  std::vector<double> seconds;
  seconds.reserve(size_t(n_repeats));
  pool.run([&](int thread) {
    Worker worker{thread, pool.size(), pool.barrier(), counters, scratch[size_t(thread)].get()};
    for (int64_t i = -1; i < n_repeats; ++i) {  // the first one does not count: it meets cold pages and sleeping threads
      const PanelMatrix& copy = copies[size_t((i + 1) % n_copies)];
      worker.wait();
      const auto begin = Clock::now();
      matmul(worker, kernels, {&copy, 1}, input, out.get(), matrix.n_rows);
      worker.wait();
      if (thread == 0 && i >= 0) seconds.push_back(seconds_since(begin));
    }
  });
  return seconds;
}

}  // namespace phi4edge
