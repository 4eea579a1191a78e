// How fast kernels are here, alone, and how fast they could be; for benchmarks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "decoder/panels.h"

namespace phi4edge {

// Operations per second (multiplying and adding are two) of the int8 dot product that the kernels of `isa` are made of, on
// n_threads at once: the limit of prefill.  The best of the passes within `seconds`.
// Throws InputError for arguments out of range, UnsupportedError for an unknown isa.
double int8_peak(const std::string& isa, int n_threads, double seconds);

// Seconds of each of n_repeats products of the matrix with x [n_tokens][n_columns]: all threads from barrier to barrier, with
// the activations quantised before.  Products take n_copies of the matrix in turn, so that caches can be made too small.
// Throws InputError for arguments out of range, UnsupportedError, OutOfMemoryError.
std::vector<double> time_multiply(const PanelMatrix& matrix, const float* x, int64_t n_tokens, int64_t n_repeats,
                                  int64_t n_copies, ThreadPool& pool, const std::string& isa);

}  // namespace phi4edge
