// What a forward pass computes in.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "decoder/config.h"
#include "decoder/ops.h"
#include "kernels/kernels.h"

namespace phi4edge {

inline constexpr int64_t kMaxRows = 128;    // computed together: their activations stay in the second-level cache
inline constexpr int64_t kQueryTokens = 8;  // tokens whose queries meet a KV head together

inline int64_t round_up16(int64_t n) { return (n + 15) / 16 * 16; }

// Of a model, for one pass at a time: it is touched only within run() of the model's thread pool.
struct Scratch {
  Scratch(const ModelConfig& config, const KernelTable& kernels, int n_threads);

  static uint64_t n_bytes(const ModelConfig& config);      // about
  static int64_t widest_input(const ModelConfig& config);  // of all products
  // Floats of the AttentionSums of kQueryTokens tokens, in lines, whatever the type of the cache.
  static int64_t attention_sums(const ModelConfig& config);

  // [kMaxRows][..] each; qkv rows are the queries, keys and values of all heads, gate_up rows the gate and then up.
  AlignedArray<float> x, normed, qkv, attention, gate_up, ffn, delta;
  const int64_t gate_up_stride;  // a line more than a row: at multiples of 64 KiB rows would push each other out of the cache
  ActivationBuffer activations;  // the input of the next product, quantised
  std::vector<AlignedArray<uint8_t>> thread_scratch;  // of each thread
};

}  // namespace phi4edge
