// Reads the hyperparameters and compares each with the tensors, so that a wrong number is found here, by name, and not as an
// overflow or a wrong answer later.
#include "decoder/config.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/text.h"
#include "quant/format.h"

namespace phi4edge {
namespace {

// What the metadata do not say.  Fused or separate tensors, and a tied head, are seen from the tensors instead.
struct Architecture {
  const char* name;
  bool interleaved_rope;
};
constexpr Architecture kArchitectures[] = {{"phi3", false}, {"llama", true}};

// Limits that keep every product of two sizes far below 2^63.
constexpr int64_t kMaxLayers = 1024, kMaxHidden = 65536, kMaxHeads = 1024, kMaxHeadDim = 1024;
constexpr int64_t kMaxFfn = 1 << 20, kMaxVocab = 1 << 22, kMaxContext = 1 << 24;

// Hints.
constexpr char kDamaged[] = "the file is damaged or was converted wrongly; convert or download it again";
constexpr char kUnsupported[] = "use a plain decoder of a supported architecture";

std::string quoted_tensor(std::string_view name) { return "tensor '" + std::string(name) + "'"; }

std::string shape_text(const gguf::Tensor& tensor) {
  std::string shape;
  for (const int64_t size : tensor.shape) shape += text(shape.empty() ? "" : " x ", size);
  return shape;
}

class Reader {
 public:
  explicit Reader(const gguf::File& file) : file_(file), path_(file.paths().front()) {}

  ModelConfig read() {
    read_architecture();
    check_neutral_keys();
    read_sizes();
    read_heads();
    read_attention();
    check_vocabulary();
    read_rope();
    check_block_count();
    check_tensors();
    return std::move(config_);
  }

 private:
  std::string key(const char* suffix) const { return config_.architecture + "." + suffix; }

  [[noreturn]] void fail(const std::string& field, const std::string& problem, const std::string& hint = kDamaged) const {
    throw BundleError(path_, field, problem, hint);
  }

  void read_architecture();
  void check_neutral_keys() const;
  void read_sizes();
  void read_heads();
  void read_attention();
  void check_vocabulary() const;
  void read_rope();
  void read_rope_scaling();
  void read_rope_factors();
  std::vector<float> read_factors(const gguf::Tensor& tensor) const;
  void check_block_count() const;
  void check_tensors() const;
  int64_t uniform_int(const char* suffix, int64_t maximum, const int64_t* fallback) const;

  const gguf::File& file_;
  const std::string path_;
  ModelConfig config_;
};

void Reader::read_architecture() {
  const std::string type = file_.string_or("general.type", "model");
  if (type != "model") fail("general.type", "is '" + type + "', expected 'model'", "name the file of the model itself");
  config_.architecture = file_.require_string("general.architecture");
  config_.name = file_.string_or("general.name", "");
  std::string supported;
  for (const Architecture& architecture : kArchitectures) {
    if (config_.architecture == architecture.name) {
      config_.rope.interleaved = architecture.interleaved_rope;
      return;
    }
    supported += (supported.empty() ? "" : ", ") + std::string(architecture.name);
  }
  fail("general.architecture", "'" + config_.architecture + "' is not supported", "supported are: " + supported);
}

// Keys that change what the decoder would have to compute.
void Reader::check_neutral_keys() const {
  struct Neutral {
    const char* suffix;
    double value;  // does nothing; so does 0, which means "not set"
    const char* meaning;
  };
  constexpr Neutral kNeutral[] = {
      {"expert_count", 0, "a mixture of experts"},
      {"attn_logit_softcapping", 0, "capped attention scores"},
      {"final_logit_softcapping", 0, "capped logits"},
      {"attention.clamp_kqv", 0, "clamped queries, keys and values"},
      {"attention.max_alibi_bias", 0, "ALiBi positions"},
      {"attention.scale", 0, "a scale of its own for attention scores"},
      {"logit_scale", 1, "scaled logits"},
      {"embedding_scale", 1, "scaled embeddings"},
      {"residual_scale", 1, "a scaled residual stream"},
  };
  for (const Neutral& neutral : kNeutral) {
    const double value = file_.float_or(key(neutral.suffix), 0.0);
    if (value == 0.0 || value == neutral.value) continue;
    fail(key(neutral.suffix), text("is ", value, ": this model needs ", neutral.meaning, ", which we do not have"),
         kUnsupported);
  }
  if (const gguf::Value* causal = file_.find(key("attention.causal"))) {
    const bool* is_causal = std::get_if<bool>(causal);
    if (!is_causal) fail(key("attention.causal"), "expected a boolean");
    if (!*is_causal) fail(key("attention.causal"), "is false: this is an encoder, not a language model", kUnsupported);
  }
}

// Some converters write one number per layer; we need them all equal.  Without a fallback the key is required.
int64_t Reader::uniform_int(const char* suffix, int64_t maximum, const int64_t* fallback) const {
  const std::string name = key(suffix);
  const gguf::Value* value = file_.find(name);
  const auto* array = value ? std::get_if<std::shared_ptr<const gguf::Array>>(value) : nullptr;
  if (!array) return fallback ? file_.int_or(name, *fallback, 1, maximum) : file_.require_int(name, 1, maximum);

  return std::visit(
      [&](const auto& items) -> int64_t {
        using Item = typename std::decay_t<decltype(items)>::value_type;
        if constexpr (std::is_same_v<Item, uint64_t> || std::is_same_v<Item, int64_t>) {
          if (items.size() != size_t(config_.n_layers)) {
            fail(name, text("has ", items.size(), " entries, but ", key("block_count"), " is ", config_.n_layers));
          }
          for (const Item item : items) {
            if (item != items[0]) {
              fail(name,
                   text("differs between layers (", items[0], " and ", item,
                        "): this model needs layers of different sizes, which we do not have"),
                   kUnsupported);
            }
          }
          if (items[0] < Item(1) || items[0] > Item(maximum)) {
            fail(name, text("is ", items[0], ", expected 1 to ", maximum));
          }
          return int64_t(items[0]);
        } else {
          fail(name, "expected integers");
        }
      },
      (*array)->items);
}

void Reader::read_sizes() {
  config_.context_length = file_.require_int(key("context_length"), 1, kMaxContext);
  config_.n_layers = file_.require_int(key("block_count"), 1, kMaxLayers);
  config_.hidden_size = file_.require_int(key("embedding_length"), 1, kMaxHidden);
  config_.ffn_size = uniform_int("feed_forward_length", kMaxFfn, nullptr);

  const gguf::Tensor* embedding = file_.find_tensor("token_embd.weight");
  if (!embedding) {
    fail(quoted_tensor("token_embd.weight"), "the tensor is missing", "this is not a whole language model; convert it again");
  }
  if (embedding->n_columns() != config_.hidden_size) {
    fail(key("embedding_length"),
         text("is ", config_.hidden_size, ", but the rows of token_embd.weight have ", embedding->n_columns(), " values"));
  }
  config_.vocab_size = embedding->n_rows();
  if (config_.vocab_size > kMaxVocab) {
    fail(quoted_tensor("token_embd.weight"), text("has ", config_.vocab_size, " rows, expected at most ", kMaxVocab));
  }
  config_.tied_head = file_.find_tensor("output.weight") == nullptr;
}

void Reader::read_heads() {
  config_.n_heads = uniform_int("attention.head_count", kMaxHeads, nullptr);
  config_.n_kv_heads = uniform_int("attention.head_count_kv", kMaxHeads, &config_.n_heads);
  if (config_.n_heads % config_.n_kv_heads != 0) {
    fail(key("attention.head_count_kv"),
         text("is ", config_.n_kv_heads, ", which does not divide ", key("attention.head_count"), " ", config_.n_heads));
  }

  const bool has_key_length = file_.find(key("attention.key_length")) != nullptr;
  if (!has_key_length && config_.hidden_size % config_.n_heads != 0) {
    fail(key("attention.head_count"),
         text("is ", config_.n_heads, ", which does not divide ", key("embedding_length"), " ", config_.hidden_size));
  }
  const int64_t even_share = config_.hidden_size / config_.n_heads;
  config_.head_dim = has_key_length ? file_.require_int(key("attention.key_length"), 1, kMaxHeadDim) : even_share;
  if (config_.head_dim < 1 || config_.head_dim > kMaxHeadDim) {
    fail(key("attention.head_count"),
         text("is ", config_.n_heads, ", which gives heads of ", config_.head_dim, " values, expected 1 to ", kMaxHeadDim));
  }
  const int64_t value_length = file_.int_or(key("attention.value_length"), config_.head_dim, 1, kMaxHeadDim);
  if (value_length != config_.head_dim) {
    fail(
        key("attention.value_length"),
        text("is ", value_length, ", but keys have ", config_.head_dim, " values: we can only read heads where both are equal"),
        kUnsupported);
  }
}

void Reader::read_attention() {
  const double epsilon = file_.require_float(key("attention.layer_norm_rms_epsilon"));
  if (!(epsilon > 0.0 && epsilon < 1.0)) {
    fail(key("attention.layer_norm_rms_epsilon"), text("is ", epsilon, ", expected more than 0 and less than 1"));
  }
  config_.rms_epsilon = float(epsilon);
  config_.sliding_window = file_.int_or(key("attention.sliding_window"), 0, 0, INT64_MAX);
  if (config_.sliding_window >= config_.context_length) config_.sliding_window = 0;
}

void Reader::check_vocabulary() const {
  const gguf::Value* tokens = file_.find("tokenizer.ggml.tokens");
  const auto* array = tokens ? std::get_if<std::shared_ptr<const gguf::Array>>(tokens) : nullptr;
  if (!array) return;  // the tokenizer reports a missing list
  const size_t n_tokens = (*array)->size();
  if (n_tokens == size_t(config_.vocab_size)) return;
  fail("tokenizer.ggml.tokens", text("has ", n_tokens, " entries, but token_embd.weight has ", config_.vocab_size, " rows"));
}

void Reader::read_rope() {
  RopeConfig& rope = config_.rope;
  rope.n_dims = file_.int_or(key("rope.dimension_count"), config_.head_dim, 2, kMaxHeadDim);
  if (rope.n_dims > config_.head_dim) {
    fail(key("rope.dimension_count"), text("is ", rope.n_dims, ", but a head has only ", config_.head_dim, " values"));
  }
  if (rope.n_dims % 2 != 0) fail(key("rope.dimension_count"), text("is ", rope.n_dims, ", expected an even number"));
  rope.base = file_.float_or(key("rope.freq_base"), 10000.0);
  if (!(rope.base > 0.0)) fail(key("rope.freq_base"), text("is ", rope.base, ", expected more than 0"));
  read_rope_scaling();
  read_rope_factors();
}

void Reader::read_rope_scaling() {
  const std::string type = file_.string_or(key("rope.scaling.type"), "");
  if (type != "" && type != "none" && type != "linear" && type != "longrope") {
    fail(key("rope.scaling.type"), "'" + type + "' is not supported", "supported are: none, linear, longrope");
  }
  if (type == "none" || type == "longrope") return;
  // Linear is meant when a factor comes without a type; 0 is "not set".
  const bool legacy = !file_.find(key("rope.scaling.factor"));
  const std::string name = key(legacy ? "rope.scale_linear" : "rope.scaling.factor");
  const double factor = file_.float_or(name, 0.0);
  if (factor < 0.0 || (factor > 0.0 && factor < 1e-6)) fail(name, text("is ", factor, ", expected more than 0"));
  if (factor > 0.0) config_.rope.position_scale = 1.0 / factor;
}

void Reader::read_rope_factors() {
  RopeConfig& rope = config_.rope;
  const gguf::Tensor* short_set = file_.find_tensor("rope_factors_short.weight");
  const gguf::Tensor* long_set = file_.find_tensor("rope_factors_long.weight");
  const gguf::Tensor* single = file_.find_tensor("rope_freqs.weight");
  if (!short_set != !long_set) {
    fail(quoted_tensor(short_set ? "rope_factors_long.weight" : "rope_factors_short.weight"),
         "the tensor is missing, although its counterpart is there");
  }
  if (single && short_set) {
    fail(quoted_tensor(single->name), "contradicts rope_factors_short.weight and rope_factors_long.weight");
  }
  if (file_.string_or(key("rope.scaling.type"), "") == "longrope" && !short_set) {
    fail(key("rope.scaling.type"), "is longrope, but rope_factors_long.weight and rope_factors_short.weight are missing");
  }

  double attention_factor = 1.0;
  if (short_set) {
    rope.factors_short = read_factors(*short_set);
    rope.factors_long = read_factors(*long_set);
    rope.original_context = file_.int_or(key("rope.scaling.original_context_length"), config_.context_length, 2, kMaxContext);
    const double original = double(rope.original_context), trained = double(config_.context_length);
    if (original < trained) attention_factor = std::sqrt(1.0 + std::log(trained / original) / std::log(original));
  } else if (single) {
    rope.factors_short = rope.factors_long = read_factors(*single);
  }
  attention_factor = file_.float_or(key("rope.scaling.attn_factor"), attention_factor);
  if (!(attention_factor > 0.0 && attention_factor < 1e6)) {
    fail(key("rope.scaling.attn_factor"), text("is ", attention_factor, ", expected more than 0"));
  }
  rope.attention_factor = float(attention_factor);
}

std::vector<float> Reader::read_factors(const gguf::Tensor& tensor) const {
  const std::string field = quoted_tensor(tensor.name);
  const Format* format = find_format(tensor.type_id);
  if (!format || !format->is_float || format->block_bytes != sizeof(float)) fail(field, "expected type F32");
  const int64_t expected = config_.rope.n_dims / 2;
  if (tensor.n_columns() != expected || tensor.n_rows() != 1) {
    fail(field, text("has shape ", shape_text(tensor), ", but half of ", key("rope.dimension_count"), " is ", expected));
  }
  std::vector<float> raw(static_cast<size_t>(expected)), factors(raw.size());
  file_.read(tensor, 0, raw.size() * sizeof(float), raw.data());
  format->dequantize(raw.data(), expected, factors.data());
  for (size_t i = 0; i < factors.size(); ++i) {
    if (!std::isfinite(factors[i]) || factors[i] <= 0.0f) {
      fail(field, text("entry ", i, " is ", factors[i], ", expected a finite number more than 0"));
    }
  }
  return factors;
}

// N of "blk.N.", or -1.
int64_t block_of(std::string_view tensor_name) {
  constexpr std::string_view kPrefix = "blk.";
  if (!tensor_name.starts_with(kPrefix)) return -1;
  int64_t block = -1;
  const char* end = tensor_name.data() + tensor_name.size();
  const auto result = std::from_chars(tensor_name.data() + kPrefix.size(), end, block);
  const bool valid = result.ec == std::errc() && result.ptr != end && *result.ptr == '.' && block >= 0;
  return valid ? block : -1;
}

void Reader::check_block_count() const {
  int64_t last = -1;
  for (const gguf::Tensor& tensor : file_.tensors()) last = std::max(last, block_of(tensor.name));
  if (last + 1 == config_.n_layers) return;
  fail(key("block_count"),
       text("is ", config_.n_layers, ", but the file has ", last < 0 ? "no blk.N tensors" : text("blk.0 to blk.", last)));
}

// What a tensor that we did not expect is for, by a part of its name.
const char* meaning_of(std::string_view name) {
  struct Meaning {
    const char* part;
    const char* meaning;
  };
  constexpr Meaning kMeanings[] = {
      {".lora_", "a LoRA adapter"},
      {".bias", "biases"},
      {"_exps", "a mixture of experts"},
      {"ffn_gate_inp", "a mixture of experts"},
      {"_shexp", "a mixture of experts"},
      {"attn_q_norm", "normalised queries and keys"},
      {"attn_k_norm", "normalised queries and keys"},
      {"attn_sub_norm", "norms inside the layers"},
      {"post_", "norms after attention or after the feed-forward part"},
      {"attn_sinks", "attention sinks"},
      {"ssm_", "state-space layers"},
      {"position_embd", "learned positions"},
      {"token_types", "token types"},
  };
  for (const Meaning& entry : kMeanings) {
    if (name.find(entry.part) != std::string_view::npos) return entry.meaning;
  }
  return "an operation for this tensor";
}

void Reader::check_tensors() const {
  const TensorLayout layout = tensor_layout(file_, config_);
  std::set<std::string_view> known = {"rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"};
  for (const TensorSpec* spec : layout.all()) {
    require_tensor(file_, *spec);
    known.insert(spec->name);
  }
  for (const gguf::Tensor& tensor : file_.tensors()) {
    if (known.count(tensor.name)) continue;
    // Old converters stored the frequencies that everyone computes from rope.freq_base.
    if (block_of(tensor.name) >= 0 && tensor.name.ends_with(".attn_rot_embd.weight")) continue;
    for (const char* part : {".attn_q.weight", ".attn_k.weight", ".attn_v.weight"}) {
      if (!tensor.name.ends_with(part)) continue;
      fail(quoted_tensor(tensor.name), "contradicts attn_qkv.weight of the same block, which holds the same weights");
    }
    fail(quoted_tensor(tensor.name), text("this model needs ", meaning_of(tensor.name), ", which we do not have"),
         kUnsupported);
  }
}

}  // namespace

std::span<const TensorSpec> LayerLayout::product(Product product) const {
  switch (product) {
    case Product::kQkv: return qkv;
    case Product::kAttentionOutput: return {&attention_output, 1};
    case Product::kGateUp: return gate_up;
    case Product::kDown: return {&down, 1};
  }
  return {};
}

std::vector<const TensorSpec*> TensorLayout::all() const {
  std::vector<const TensorSpec*> specs = {&embedding, &output_norm};
  if (head) specs.push_back(&*head);
  for (const LayerLayout& layer : layers) {
    specs.push_back(&layer.attention_norm);
    for (const TensorSpec& spec : layer.qkv) specs.push_back(&spec);
    specs.push_back(&layer.attention_output);
    specs.push_back(&layer.ffn_norm);
    for (const TensorSpec& spec : layer.gate_up) specs.push_back(&spec);
    specs.push_back(&layer.down);
  }
  return specs;
}

TensorLayout tensor_layout(const gguf::File& file, const ModelConfig& config) {
  const int64_t hidden = config.hidden_size, ffn = config.ffn_size;
  const int64_t q_rows = config.n_heads * config.head_dim, kv_rows = config.n_kv_heads * config.head_dim;
  const std::string hidden_text = text("embedding_length ", hidden);
  const std::string heads_text = text(hidden_text, ", head_count ", config.n_heads, ", head_count_kv ", config.n_kv_heads,
                                      ", head size ", config.head_dim);
  const std::string ffn_text = text(hidden_text, ", feed_forward_length ", ffn);

  TensorLayout layout;
  layout.embedding = {"token_embd.weight", hidden, config.vocab_size, hidden_text};
  layout.output_norm = {"output_norm.weight", hidden, 1, hidden_text};
  if (!config.tied_head) {
    layout.head = {"output.weight", hidden, config.vocab_size,
                   text(hidden_text, ", ", config.vocab_size, " rows in token_embd.weight")};
  }
  layout.layers.resize(size_t(config.n_layers));
  for (size_t i = 0; i < layout.layers.size(); ++i) {
    LayerLayout& layer = layout.layers[i];
    const std::string block = text("blk.", i, ".");
    layer.attention_norm = {block + "attn_norm.weight", hidden, 1, hidden_text};
    layer.ffn_norm = {block + "ffn_norm.weight", hidden, 1, hidden_text};
    layer.attention_output = {block + "attn_output.weight", q_rows, hidden, heads_text};
    layer.down = {block + "ffn_down.weight", ffn, hidden, ffn_text};
    const bool has_part = file.find_tensor(block + "attn_q.weight") || file.find_tensor(block + "attn_k.weight") ||
                          file.find_tensor(block + "attn_v.weight");
    if (has_part && !file.find_tensor(block + "attn_qkv.weight")) {
      layer.qkv = {{block + "attn_q.weight", hidden, q_rows, heads_text},
                   {block + "attn_k.weight", hidden, kv_rows, heads_text},
                   {block + "attn_v.weight", hidden, kv_rows, heads_text}};
    } else {
      layer.qkv = {{block + "attn_qkv.weight", hidden, q_rows + 2 * kv_rows, heads_text}};
    }
    if (file.find_tensor(block + "ffn_gate.weight")) {
      layer.gate_up = {{block + "ffn_gate.weight", hidden, ffn, ffn_text}, {block + "ffn_up.weight", hidden, ffn, ffn_text}};
    } else {
      layer.gate_up = {{block + "ffn_up.weight", hidden, 2 * ffn, ffn_text + ", gate and up in one tensor"}};
    }
  }
  return layout;
}

const gguf::Tensor& require_tensor(const gguf::File& file, const TensorSpec& spec) {
  const gguf::Tensor* tensor = file.find_tensor(spec.name);
  if (!tensor) {
    throw BundleError(file.paths().front(), quoted_tensor(spec.name), "the tensor is missing",
                      "the file is not complete; download or convert it again");
  }
  if (tensor->n_columns() != spec.n_columns || tensor->n_rows() != spec.n_rows) {
    const std::string expected = text(spec.n_columns, spec.n_rows == 1 ? "" : text(" x ", spec.n_rows));
    throw BundleError(file.paths()[size_t(tensor->shard)], quoted_tensor(spec.name),
                      text("has shape ", shape_text(*tensor), ", but the metadata ask for ", expected, " (", spec.because, ")"),
                      kDamaged);
  }
  return *tensor;
}

ModelConfig read_config(const gguf::File& file) { return Reader(file).read(); }

}  // namespace phi4edge
