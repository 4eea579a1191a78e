#include "decoder/weights.h"

#include "base/text.h"

namespace phi4edge {
namespace {

std::vector<float> load_norm(const gguf::File& file, const TensorSpec& spec) {
  const gguf::Tensor& tensor = require_tensor(file, spec);
  const Format& format = require_format(file, tensor);
  if (!format.is_float)
    fail_tensor(file, tensor, text("is stored as ", type_text(tensor), ", expected F32, F16 or BF16"),
                "requantize the model, but not its norms");
  std::vector<uint8_t> raw(tensor.n_bytes);
  std::vector<float> values(size_t(tensor.n_columns()));
  file.read(tensor, 0, tensor.n_bytes, raw.data());
  format.dequantize(raw.data(), tensor.n_columns(), values.data());
  const int64_t bad = find_not_finite(values.data(), tensor.n_columns());
  if (bad < tensor.n_columns()) {
    fail_tensor(file, tensor, text("entry ", bad, " is ", values[size_t(bad)]),
                "the file is damaged; download or convert it again");
  }
  return values;
}

// Makes the layers and calls visit(spec, matrix) for each matrix, in the order in which a forward pass needs them.
template <class Visit>
void visit_matrices(const TensorLayout& layout, Weights& weights, const Visit& visit) {
  visit(layout.embedding, weights.embedding);
  if (layout.head) visit(*layout.head, weights.head);
  weights.layers.resize(layout.layers.size());
  for (size_t i = 0; i < layout.layers.size(); ++i) {
    const LayerLayout& specs = layout.layers[i];
    LayerWeights& layer = weights.layers[i];
    layer.qkv.resize(specs.qkv.size());
    for (size_t part = 0; part < specs.qkv.size(); ++part) visit(specs.qkv[part], layer.qkv[part]);
    visit(specs.attention_output, layer.attention_output);
    layer.gate_up.resize(specs.gate_up.size());
    for (size_t part = 0; part < specs.gate_up.size(); ++part) visit(specs.gate_up[part], layer.gate_up[part]);
    visit(specs.down, layer.down);
  }
}

}  // namespace

std::span<const PanelMatrix> LayerWeights::product(Product product) const {
  switch (product) {
    case Product::kQkv: return qkv;
    case Product::kAttentionOutput: return {&attention_output, 1};
    case Product::kGateUp: return gate_up;
    case Product::kDown: return {&down, 1};
  }
  return {};
}

size_t Weights::n_bytes() const {
  size_t total = embedding.n_bytes() + head.n_bytes() + output_norm.size() * sizeof(float);
  for (const LayerWeights& layer : layers) {
    for (const PanelMatrix& matrix : layer.qkv) total += matrix.n_bytes();
    for (const PanelMatrix& matrix : layer.gate_up) total += matrix.n_bytes();
    total += layer.attention_output.n_bytes() + layer.down.n_bytes();
    total += (layer.attention_norm.size() + layer.ffn_norm.size()) * sizeof(float);
  }
  return total;
}

uint64_t weight_bytes(const gguf::File& file, const ModelConfig& config) {
  uint64_t total = uint64_t(2 * config.n_layers + 1) * uint64_t(config.hidden_size) * sizeof(float);  // norms
  Weights unused;
  visit_matrices(tensor_layout(file, config), unused, [&](const TensorSpec& spec, PanelMatrix&) {
    total += panels_for(file, require_tensor(file, spec)).n_bytes();
  });
  return total;
}

Weights load_weights(const gguf::File& file, const ModelConfig& config, ThreadPool& pool, const LoadProgress& progress) {
  const TensorLayout layout = tensor_layout(file, config);
  Weights weights;
  std::vector<PanelLoad> loads;
  visit_matrices(layout, weights, [&](const TensorSpec& spec, PanelMatrix& matrix) {
    const gguf::Tensor& tensor = require_tensor(file, spec);
    matrix = panels_for(file, tensor);
    loads.push_back({&tensor, &matrix});
  });
  // Norms first: they are small, and what is wrong with them is found before the long part.
  weights.output_norm = load_norm(file, layout.output_norm);
  for (size_t i = 0; i < layout.layers.size(); ++i) {
    weights.layers[i].attention_norm = load_norm(file, layout.layers[i].attention_norm);
    weights.layers[i].ffn_norm = load_norm(file, layout.layers[i].ffn_norm);
  }
  for (const PanelLoad& load : loads) weights.activation_scales |= activation_scales({load.matrix, 1});
  load_panels(file, loads, Values::kAny, pool, progress);
  return weights;
}

}  // namespace phi4edge
