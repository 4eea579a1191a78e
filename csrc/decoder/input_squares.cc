#include "decoder/input_squares.h"

#include <utility>

namespace phi4edge {

InputSquares::InputSquares(const TensorLayout& layout) {
  const auto add_entry = [this](std::span<const TensorSpec> specs) {
    Entry entry;
    for (const TensorSpec& spec : specs) entry.tensors.push_back(spec.name);
    entry.sums.resize(size_t(specs.front().n_columns));
    entries_.push_back(std::move(entry));
  };
  for (const LayerLayout& layer : layout.layers) {
    for (const Product product : kProducts) add_entry(layer.product(product));
  }
  add_entry({layout.head ? &*layout.head : &layout.embedding, 1});
}

void InputSquares::add(Worker& worker, size_t place, const float* x, int64_t n_tokens) {
  Entry& entry = entries_[place];
  const auto n_columns = int64_t(entry.sums.size());
  if (worker.thread == 0) entry.n_tokens += n_tokens;
  worker.share(n_columns, 256, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < n_tokens; ++t) {
      const float* row = x + t * n_columns;
      for (int64_t i = begin; i < end; ++i) entry.sums[size_t(i)] += double(row[i]) * double(row[i]);
    }
  });
}

}  // namespace phi4edge
