// Hyperparameters of a decoder, from GGUF metadata.  The decoder's behaviour follows from these numbers alone.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gguf/gguf.h"

namespace phi4edge {

struct RopeConfig {
  int64_t n_dims = 0;  // leading dims of each head that are rotated; even
  double base = 10000.0;
  bool interleaved = false;       // pairs (2i, 2i+1) instead of (i, i + n_dims / 2)
  double position_scale = 1.0;    // linear scaling: positions are multiplied by this
  float attention_factor = 1.0f;  // multiplies cos and sin
  // Divisors of the frequencies, n_dims / 2 each, or empty.  `factors_long` holds beyond `original_context` tokens in the
  // sequence; equal to `factors_short` in models that have only one set.
  std::vector<float> factors_short, factors_long;
  int64_t original_context = 0;  // 0: never switches
};

struct ModelConfig {
  std::string architecture;  // general.architecture
  std::string name;          // general.name, may be empty
  int64_t n_layers = 0, hidden_size = 0, n_heads = 0, n_kv_heads = 0, head_dim = 0, ffn_size = 0, vocab_size = 0;
  int64_t context_length = 0;  // trained
  int64_t sliding_window = 0;  // keys a query may see, itself included; 0 is all
  float rms_epsilon = 1e-5f;
  bool tied_head = false;
  RopeConfig rope;
};

// A tensor that the decoder reads.  `because` lists the metadata that the shape follows from, for errors.
struct TensorSpec {
  std::string name;
  int64_t n_columns = 0, n_rows = 0;  // n_rows is 1 for a vector
  std::string because;
};

// The matrix products of a layer; each has one input.
enum class Product { kQkv, kAttentionOutput, kGateUp, kDown };
inline constexpr Product kProducts[] = {Product::kQkv, Product::kAttentionOutput, Product::kGateUp, Product::kDown};

struct LayerLayout {
  TensorSpec attention_norm, ffn_norm, attention_output, down;
  std::vector<TensorSpec> qkv;      // one fused tensor, or q, k, v: whichever the file has
  std::vector<TensorSpec> gate_up;  // one fused tensor, or gate, up

  std::span<const TensorSpec> product(Product product) const;  // the tensors whose rows are stacked in the output
};

// Every weight of a decoder in this file, with the shape that the config asks for.
struct TensorLayout {
  TensorSpec embedding, output_norm;
  std::optional<TensorSpec> head;  // none when tied to the embedding
  std::vector<LayerLayout> layers;

  std::vector<const TensorSpec*> all() const;
};

TensorLayout tensor_layout(const gguf::File& file, const ModelConfig& config);

// The tensor of that name; BundleError when it is missing or of another shape.
const gguf::Tensor& require_tensor(const gguf::File& file, const TensorSpec& spec);

// Throws BundleError when a key is missing or of the wrong kind, or when keys and tensor shapes disagree (both numbers are
// shown), when the file has tensors or keys that need operations we do not have, and for an architecture or RoPE scaling that
// is not known, with the list of those that are.
ModelConfig read_config(const gguf::File& file);

}  // namespace phi4edge
