#include "decoder/adapter.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "decoder/decoder.h"
#include "decoder/memory.h"

namespace phi4edge {
namespace {

constexpr int64_t kMaxRank = 1 << 14;  // far beyond any adapter, and an end to what a session sets aside for one
constexpr std::string_view kSuffixA = ".lora_a", kSuffixB = ".lora_b";
const char* const kDamaged = "the adapter is damaged or made by a tool that we do not know; convert it again";

// A matrix of the model that an adapter may change, and the pair of tensors that does.
struct Target {
  size_t product;  // index into Adapter's updates
  size_t matrix;   // of the product's
  const TensorSpec* spec;
  int64_t first_row;
  const gguf::Tensor *a = nullptr, *b = nullptr;
};

[[noreturn]] void fail(const gguf::File& file, const std::string& field, const std::string& problem, const std::string& hint) {
  throw BundleError(file.paths().front(), field, problem, hint);
}

// The text of a key, or nothing when it is missing or no text.
std::string text_of(const gguf::File& file, const char* key) {
  const gguf::Value* value = file.find(key);
  const auto* string = value ? std::get_if<std::string>(value) : nullptr;
  return string ? *string : std::string();
}

void check_kind(const gguf::File& file, const ModelConfig& base) {
  const std::string type = text_of(file, "general.type"), kind = text_of(file, "adapter.type");
  if (type != "adapter") {
    fail(file, "general.type", type.empty() ? "does not say 'adapter'" : text("is '", type, "', expected 'adapter'"),
         "this is no LoRA adapter; give the path of one");
  }
  if (kind != "lora") {
    fail(file, "adapter.type", kind.empty() ? "does not say 'lora'" : text("is '", kind, "', expected 'lora'"),
         "only LoRA adapters can be applied");
  }
  const std::string architecture = text_of(file, "general.architecture");
  if (architecture != base.architecture) {
    fail(file, "general.architecture",
         text("the adapter needs base '", architecture, "', got a model of architecture '", base.architecture, "'"),
         "use it with the model that it was trained for");
  }
}

double read_alpha(const gguf::File& file) {
  const double alpha = file.require_float("adapter.lora.alpha");
  if (!(alpha > 0.0)) fail(file, "adapter.lora.alpha", text("is ", alpha, ", expected more than 0"), kDamaged);
  return alpha;
}

// Every matrix of the model that can be a target, by name.
std::map<std::string_view, Target> targets_of(const TensorLayout& layout) {
  std::map<std::string_view, Target> targets;
  size_t index = 0;
  for (const LayerLayout& layer : layout.layers) {
    for (const Product product : kProducts) {
      int64_t first_row = 0;
      size_t matrix = 0;
      for (const TensorSpec& spec : layer.product(product)) {
        targets.emplace(spec.name, Target{index, matrix++, &spec, first_row});
        first_row += spec.n_rows;
      }
      ++index;
    }
  }
  return targets;
}

void assign_tensors(const gguf::File& file, std::map<std::string_view, Target>& targets) {
  if (file.tensors().empty()) fail(file, "tensors", "the adapter has none", kDamaged);
  for (const gguf::Tensor& tensor : file.tensors()) {
    const std::string_view name = tensor.name;
    const bool is_a = name.ends_with(kSuffixA), is_b = name.ends_with(kSuffixB);
    if (!is_a && !is_b) {
      fail_tensor(file, tensor, "is not a part of a LoRA, whose names end in .lora_a or .lora_b",
                  "leave out modules that were trained whole");
    }
    const auto target = targets.find(name.substr(0, name.size() - kSuffixA.size()));
    if (target == targets.end()) {
      fail_tensor(file, tensor, "changes a tensor that this model does not have, or that adapters cannot change",
                  "use the model that the adapter was trained for; adapters change attn_* and ffn_* matrices");
    }
    (is_a ? target->second.a : target->second.b) = &tensor;
  }
}

std::string shape_text(const gguf::Tensor& tensor) {
  std::string out = "[";
  for (size_t d = 0; d < tensor.shape.size(); ++d) out += (d ? ", " : "") + std::to_string(tensor.shape[d]);
  return out + "]";
}

// Both are there, of one rank, and fit the model's matrix.
void check_pair(const gguf::File& file, const Target& target) {
  const TensorSpec& base = *target.spec;
  if (!target.a || !target.b) {
    const gguf::Tensor& present = *(target.a ? target.a : target.b);
    fail_tensor(file, present, text("its counterpart ", base.name, target.a ? kSuffixB : kSuffixA, " is missing"), kDamaged);
  }
  const int64_t rank = target.a->n_rows();
  const auto check = [&](const gguf::Tensor& tensor, int64_t n_columns, int64_t n_rows) {
    if (tensor.n_columns() == n_columns && tensor.n_rows() == n_rows) return;
    fail_tensor(file, tensor,
                text("has shape ", shape_text(tensor), ", but ", base.name, " of the model has ", base.n_columns,
                     " columns and ", base.n_rows, " rows, and the rank is ", rank),
                "use the model that the adapter was trained for");
  };
  check(*target.a, base.n_columns, rank);
  if (target.b->n_columns() != rank) {
    fail_tensor(file, *target.b, text("has rank ", target.b->n_columns(), ", but its counterpart has ", rank), kDamaged);
  }
  check(*target.b, rank, base.n_rows);
  if (rank > kMaxRank) {
    fail_tensor(file, *target.a, text("has rank ", rank, ", expected at most ", kMaxRank), kDamaged);
  }
}

uint64_t next_id() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

int64_t LowRankUpdate::total_rank() const {
  int64_t total = 0;
  for (const PanelMatrix& matrix : a) total += matrix.n_rows;
  return total;
}

Adapter::Adapter(std::shared_ptr<Model> model, const gguf::File& file, uint64_t available_memory, const LoadProgress& progress)
    : model_(std::move(model)), id_(next_id()) {
  check_kind(file, model_->config());
  const double alpha = read_alpha(file);
  std::map<std::string_view, Target> targets = targets_of(model_->layout());
  assign_tensors(file, targets);

  updates_.resize(model_->layout().layers.size() * std::size(kProducts));
  for (const auto& [name, target] : targets) {
    if (!target.a && !target.b) continue;
    check_pair(file, target);
    LowRankUpdate& update = updates_[target.product];
    update.a.push_back(panels_for(file, *target.a));
    update.b.push_back(panels_for(file, *target.b));
    update.parts.push_back({target.matrix, target.first_row, alpha / double(target.a->n_rows())});
    n_bytes_ += update.a.back().n_bytes() + update.b.back().n_bytes();
    activation_scales_ |= phi4edge::activation_scales({&update.a.back(), 1});
    max_total_rank_ = std::max(max_total_rank_, update.total_rank());
    max_parts_ = std::max(max_parts_, update.parts.size());
    max_scale_ = std::max(max_scale_, update.parts.back().scale);
  }
  if (max_scale_ > double(std::numeric_limits<float>::max())) {
    fail(file, "adapter.lora.alpha", text("is ", alpha, ", which is too large"), kDamaged);
  }
  require_adapter_memory(n_bytes_, available_memory);

  std::vector<PanelLoad> loads;  // the updates no longer move
  std::vector<size_t> next(updates_.size());
  for (const auto& [name, target] : targets) {
    if (!target.a) continue;
    LowRankUpdate& update = updates_[target.product];
    const size_t part = next[target.product]++;
    loads.push_back({target.a, &update.a[part]});
    loads.push_back({target.b, &update.b[part]});
  }
  load_panels(file, loads, Values::kFinite, model_->pool(), progress);
}

const LowRankUpdate* Adapter::update(int64_t layer, Product product) const {
  const LowRankUpdate& update = updates_[size_t(layer) * std::size(kProducts) + size_t(product)];
  return update.a.empty() ? nullptr : &update;
}

}  // namespace phi4edge
