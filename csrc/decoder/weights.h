// The weights of a decoder, repacked into panels when they are loaded.  Shared read-only between sessions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "decoder/config.h"
#include "decoder/ops.h"
#include "decoder/panels.h"
#include "gguf/gguf.h"

namespace phi4edge {

struct LayerWeights {
  std::vector<float> attention_norm, ffn_norm;  // [hidden_size]
  std::vector<PanelMatrix> qkv;                 // one fused matrix, or q, k, v; stacked rows are always Q, then K, then V
  PanelMatrix attention_output;
  std::vector<PanelMatrix> gate_up;  // one fused matrix, or gate, up; stacked rows are always gate, then up
  PanelMatrix down;

  std::span<const PanelMatrix> product(Product product) const;
};

struct Weights {
  PanelMatrix embedding;  // [vocab, hidden]
  PanelMatrix head;       // empty (format == nullptr) when tied to the embedding
  std::vector<float> output_norm;
  std::vector<LayerWeights> layers;

  ActivationScales activation_scales = 0;  // of all products

  const PanelMatrix& output_head() const { return head.format ? head : embedding; }
  size_t n_bytes() const;
};

// Bytes the weights of this file will take in memory: Weights::n_bytes() without loading.
uint64_t weight_bytes(const gguf::File& file, const ModelConfig& config);

// Throws BundleError (a missing tensor, a shape or type that does not fit, a file that became shorter, a NaN or infinity in
// a norm), OutOfMemoryError.
Weights load_weights(const gguf::File& file, const ModelConfig& config, ThreadPool& pool, const LoadProgress& progress);

}  // namespace phi4edge
