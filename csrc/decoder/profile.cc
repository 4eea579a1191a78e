#include "decoder/profile.h"

#include "decoder/adapter.h"
#include "decoder/weights.h"

namespace phi4edge {

Operation operation_of(Product product) {
  switch (product) {
    case Product::kQkv: return Operation::kQkv;
    case Product::kAttentionOutput: return Operation::kAttentionOutput;
    case Product::kGateUp: return Operation::kGateUp;
    case Product::kDown: return Operation::kDown;
  }
  return Operation::kHead;
}

void Profile::begin_pass() {
  const auto now = Clock::now();
  for (ThreadTimes& times : threads_) times.last = now;
}

// Whoever was done earlier has waited for the last one.
void Profile::end_pass() {
  for (size_t thread = 0; thread < threads_.size(); ++thread) done(int(thread), Operation::kWait);
}

void Profile::add_product(Operation operation, const PanelMatrix& matrix, int64_t n_tokens) {
  Work& work = work_[int(operation)];
  work.n_bytes += matrix.n_bytes();
  work.operations += 2 * uint64_t(matrix.n_rows) * uint64_t(matrix.n_columns) * uint64_t(n_tokens);
}

void Profile::add_weights(const Weights& weights, int64_t n_tokens, int64_t n_logits) {
  for (const LayerWeights& layer : weights.layers) {
    for (const Product product : kProducts) {
      for (const PanelMatrix& matrix : layer.product(product)) add_product(operation_of(product), matrix, n_tokens);
    }
  }
  if (n_logits > 0) add_product(Operation::kHead, weights.output_head(), n_logits);
}

void Profile::add_adapter(const Adapter& adapter, int64_t n_layers, int64_t n_tokens) {
  for (int64_t layer = 0; layer < n_layers; ++layer) {
    for (const Product product : kProducts) {
      const LowRankUpdate* update = adapter.update(layer, product);
      if (!update) continue;
      for (const PanelMatrix& a : update->a) add_product(Operation::kAdapterA, a, n_tokens);
      for (const PanelMatrix& b : update->b) add_product(Operation::kAdapterB, b, n_tokens);
    }
  }
}

std::vector<OperationTotal> Profile::totals() const {
  std::vector<OperationTotal> totals;
  for (int operation = 0; operation < kOperationCount; ++operation) {
    double seconds = 0;
    for (const ThreadTimes& times : threads_) seconds += std::chrono::duration<double>(times.spent[operation]).count();
    const Work& work = work_[operation];
    totals.push_back({kOperationNames[operation], seconds / double(threads_.size()), work.n_bytes, work.operations});
  }
  return totals;
}

}  // namespace phi4edge
