// The weights of a decoder, repacked into panels when they are loaded.  Shared read-only between sessions.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/thread_pool.h"
#include "decoder/config.h"
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

  const PanelMatrix& output_head() const { return head.format ? head : embedding; }
  size_t n_bytes() const;
};

// File bytes done, file bytes in all; returns false to cancel (a CancelledError follows).  Called on the caller's thread only,
// at the start, at the end, and in between about 30 times a second.  May be empty.
using LoadProgress = std::function<bool(uint64_t done, uint64_t total)>;

// Bytes the weights of this file will take in memory: Weights::n_bytes() without loading.
uint64_t weight_bytes(const gguf::File& file, const ModelConfig& config);

// Throws BundleError (a missing tensor, a shape or type that does not fit, a file that became shorter, a NaN or infinity in
// a norm), OutOfMemoryError.
Weights load_weights(const gguf::File& file, const ModelConfig& config, ThreadPool& pool, const LoadProgress& progress);

// Decodes every tensor of the file and throws a BundleError that names the first one with a NaN or an infinity.  For a check
// that the user asks for: it reads the whole file.
void check_finite(const gguf::File& file, ThreadPool& pool, const LoadProgress& progress);

}  // namespace phi4edge
