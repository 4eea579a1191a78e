// What a forward pass is made of: shared work, quantised activations, matrix products, normalisation, rotation.
//
// A forward pass runs on all threads at once (SPMD).  Every op below is called by every thread with its Worker, takes a
// share of the work, and returns without waiting; the caller places the barriers.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/thread_pool.h"
#include "decoder/config.h"
#include "decoder/panels.h"
#include "decoder/profile.h"
#include "kernels/kernels.h"

namespace phi4edge {

// Hands out pieces of each loop of a forward pass; a counter for each thread in a loop, all zero at first.
class WorkCounters {
 public:
  WorkCounters(size_t n_loops, int n_threads) : n_threads_(size_t(n_threads)), next_(n_loops * n_threads_) {}
  std::atomic<int64_t>& at(size_t loop, int thread) { return next_.at(loop * n_threads_ + size_t(thread)); }

 private:
  size_t n_threads_;
  std::vector<std::atomic<int64_t>> next_;
};

// One thread's view of a forward pass.  Threads meet the loops in the same order, so the loop's number names its counter.
struct Worker {
  int thread, n_threads;
  SpinBarrier& barrier;
  WorkCounters& counters;
  void* scratch;
  size_t loop = 0;
  Profile* profile = nullptr;  // of the pass, when it is wanted

  // The time since the last call was for this.
  void done(Operation operation) {
    if (profile) profile->done(thread, operation);
  }
  void wait() {
    barrier.wait();
    done(Operation::kWait);
  }

  // body(begin, end) for pieces of [0, n), `grain` at a time, whichever thread is free.
  template <class Body>
  void share(int64_t n, int64_t grain, Body&& body) {
    std::atomic<int64_t>& next = counters.at(loop++, 0);
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      body(begin, begin + grain < n ? begin + grain : n);
    }
  }

  // The same, but each thread first goes through a stretch of its own, and then helps the others: what a body reads ahead is
  // what its thread reads next.
  template <class Body>
  void share_stretches(int64_t n, int64_t grain, Body&& body) {
    const int64_t n_pieces = (n + grain - 1) / grain;
    for (int i = 0; i < n_threads; ++i) {
      const int owner = (thread + i) % n_threads;
      const int64_t first = n_pieces * owner / n_threads, end = n_pieces * (owner + 1) / n_threads;
      std::atomic<int64_t>& next = counters.at(loop, owner);
      for (;;) {
        const int64_t piece = first + next.fetch_add(1, std::memory_order_relaxed);
        if (piece >= end) break;
        body(piece * grain, piece * grain + grain < n ? piece * grain + grain : n);
      }
    }
    ++loop;
  }
};

// The ways in which activations are quantised for some matrices: bit s stands for ActivationScale s.
using ActivationScales = unsigned;
ActivationScales activation_scales(std::span<const PanelMatrix> matrices);

// Room for the quantised activations of a batch of tokens.
class ActivationBuffer {
 public:
  ActivationBuffer() = default;
  ActivationBuffer(int64_t max_tokens, int64_t max_columns);

  // Quantises one of n_tokens tokens, or, with sb * n_tokens + token for `at`, n_columns of it from super-block sb on.
  void quantize(const float* x, int64_t at, int64_t n_tokens, int64_t n_columns, ActivationScales scales,
                const KernelTable& kernels);
  Activations view(int64_t n_tokens, int64_t n_columns, const float* values, int64_t value_stride) const;

 private:
  struct Arrays {
    AlignedArray<int8_t> codes, sum_digits;
    AlignedArray<int32_t> shifts, neg_sums;
    AlignedArray<float> scales, neg_sums32;
  };
  QuantizedActivations at(int kind, int64_t at) const;

  Arrays arrays_[kActivationScaleCount];
};

// Panels of one of the matrices of a product.
struct Piece {
  size_t matrix;
  int64_t begin, end;
};
using PieceDone = std::function<void(const Piece&)>;  // called by the thread that did it, which has the piece in its cache

// out[token][row], the rows of the matrices stacked.  out_stride >= the sum of their rows.
void matmul(Worker& worker, const KernelTable& kernels, std::span<const PanelMatrix> matrices, const Activations& x, float* out,
            int64_t out_stride, const PieceDone& piece_done = {});
// out[token][row] += factor * product, of these panels, by this thread alone
void add_product(Worker& worker, const KernelTable& kernels, const PanelMatrix& matrix, int64_t begin, int64_t end,
                 const Activations& x, float factor, float* out, int64_t out_stride);

// Cosines and sines of one position, [n_dims / 2] each, with the attention factor applied.
void rope_angles(const RopeConfig& rope, bool use_long_factors, int64_t position, float* cosine, float* sine);
// Rotates the leading n_dims of one head in place.
void rotate(const RopeConfig& rope, const float* cosine, const float* sine, float* head);

}  // namespace phi4edge
