// Sums of squares of the inputs of each weight matrix: how much each of its columns matters when it is quantized.
#pragma once

#include <cstdint>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "decoder/config.h"
#include "decoder/ops.h"

namespace phi4edge {

// Matrices with one input, such as Q, K and V, share an entry.
class InputSquares {
 public:
  struct Entry {
    std::vector<std::string> tensors;  // GGUF names of the matrices
    std::vector<double> sums;          // over tokens, [n_columns]
    int64_t n_tokens = 0;
  };

  explicit InputSquares(const TensorLayout& layout);

  // Places of the inputs of a layer's products, and of the output head's.
  size_t at(int64_t layer, Product product) const { return size_t(layer) * std::size(kProducts) + size_t(product); }
  size_t at_head() const { return entries_.size() - 1; }

  // Adds rows x[n_tokens][n_columns] of floats; every thread calls it.  A column is added up by one thread in the order of the
  // tokens, so the sum does not depend on the threads.
  void add(Worker& worker, size_t place, const float* x, int64_t n_tokens);

  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
};

}  // namespace phi4edge
