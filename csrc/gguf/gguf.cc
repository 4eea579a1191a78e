#include "gguf/gguf.h"

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/text.h"
#include "gguf/shard.h"
#include "gguf/value.h"

namespace phi4edge::gguf {
namespace {

constexpr int64_t kMaxSplits = 65535;  // split.count has 16 bits

// split.no and the like: 0 when the file is not split.
uint64_t split_value(const Shard& shard, const char* key, int64_t maximum) {
  const Value* value = shard.find(key);
  return value ? uint64_t(int_in_range(shard.file.path(), key, *value, 0, maximum)) : 0;
}

std::string split_suffix(uint64_t index, uint64_t count) {
  char suffix[64];
  std::snprintf(suffix, sizeof(suffix), "-%05llu-of-%05llu.gguf", static_cast<unsigned long long>(index + 1),
                static_cast<unsigned long long>(count));
  return suffix;
}

// "dir/name-00002-of-00003.gguf" -> "dir/name"; nothing when the name does not fit the numbers.
std::optional<std::string> split_stem(const std::string& path, uint64_t index, uint64_t count) {
  const std::string suffix = split_suffix(index, count);
  if (path.size() < suffix.size() || path.compare(path.size() - suffix.size(), suffix.size(), suffix) != 0) return std::nullopt;
  return path.substr(0, path.size() - suffix.size());
}

void check_sibling(const Shard& first, const Shard& shard, uint64_t index, uint64_t count) {
  const std::string& path = shard.file.path();
  const auto no = split_value(shard, "split.no", kMaxSplits);
  if (no != index) throw BundleError(path, "split.no", text("expected ", index, ", found ", no), kDamaged);
  const auto own_count = split_value(shard, "split.count", kMaxSplits);
  if (own_count != count) {
    throw BundleError(path, "split.count", text("expected ", count, ", found ", own_count),
                      "the shard belongs to another model");
  }
  for (const auto& [key, value] : shard.metadata) {
    const Value* expected = first.find(key);
    if (expected && key != "split.no" && !same(*expected, value)) {
      throw BundleError(path, key, text("differs from ", first.file.path()), "the shard belongs to another model");
    }
  }
}

}  // namespace

size_t Array::size() const {
  return std::visit([](const auto& values) { return values.size(); }, items);
}

int64_t Tensor::n_rows() const {
  int64_t rows = 1;  // the product was checked when the file was opened
  for (size_t d = 1; d < shape.size(); ++d) rows *= shape[d];
  return rows;
}

struct File::Impl {
  std::vector<Shard> shards;
  std::vector<std::string> paths, warnings;
  std::vector<Tensor> tensors;
  std::map<std::string_view, size_t> tensor_index;

  explicit Impl(const std::string& path) {
    shards.emplace_back(path, 0);
    open_siblings();
    size_t n_tensors = 0;
    for (const Shard& shard : shards) n_tensors += shard.tensors.size();
    tensors.reserve(n_tensors);
    for (Shard& shard : shards) {
      paths.push_back(shard.file.path());
      warnings.insert(warnings.end(), shard.warnings.begin(), shard.warnings.end());
      std::move(shard.tensors.begin(), shard.tensors.end(), std::back_inserter(tensors));
      shard.tensors = {};
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& tensor = tensors[i];
      const auto [at, is_new] = tensor_index.emplace(tensor.name, i);
      if (is_new) continue;
      const std::string& other = paths[size_t(tensors[at->second].shard)];
      throw BundleError(paths[size_t(tensor.shard)], text("tensor '", tensor.name, "'"),
                        shards.size() > 1 ? text("the tensor is also in ", other) : "the tensor appears twice", kDamaged);
    }
  }

  void open_siblings() {
    const std::string path = shards[0].file.path();
    const auto count = split_value(shards[0], "split.count", kMaxSplits);
    if (count < 2) return;  // merged files keep a count of 0
    const auto index = split_value(shards[0], "split.no", kMaxSplits);
    const auto stem = split_stem(path, index, count);
    if (index != 0) {
      throw BundleError(path, "split.no", text("this is shard ", index + 1, " of ", count),
                        text("open the first one, ", stem ? *stem + split_suffix(0, count) : "..." + split_suffix(0, count)));
    }
    if (!stem) {
      throw BundleError(path, "split.count",
                        text("the first of ", count, " shards, but the name does not end in ", split_suffix(0, count)),
                        "give the shards their original names");
    }
    uint64_t n_tensors = shards[0].tensors.size();
    for (uint64_t i = 1; i < count; ++i) {
      const std::string sibling = *stem + split_suffix(i, count);
      if (access(sibling.c_str(), F_OK) != 0 && errno == ENOENT) {
        throw BundleError(path, "split.count", text("shard ", i + 1, " of ", count, " is missing: ", sibling),
                          "download it to the same folder");
      }
      shards.emplace_back(sibling, int(i));
      check_sibling(shards[0], shards[size_t(i)], i, count);
      n_tensors += shards[size_t(i)].tensors.size();
    }
    const auto expected = split_value(shards[0], "split.tensors.count", std::numeric_limits<int64_t>::max());
    if (shards[0].find("split.tensors.count") && expected != n_tensors) {
      throw BundleError(path, "split.tensors.count",
                        text("expected ", expected, " tensors, the ", count, " shards hold ", n_tensors),
                        "the shards belong to different models");
    }
  }

  const Value& require(std::string_view key) const {
    const Value* value = shards[0].find(key);
    if (!value) throw BundleError(paths[0], std::string(key), "the key is missing", "convert the model again");
    return *value;
  }

  double finite(std::string_view key, const Value& value) const {
    double number;
    if (const auto* d = std::get_if<double>(&value)) {
      number = *d;
    } else if (const auto* u = std::get_if<uint64_t>(&value)) {
      number = double(*u);
    } else if (const auto* i = std::get_if<int64_t>(&value)) {
      number = double(*i);
    } else {
      throw BundleError(paths[0], std::string(key), text("expected a number, found ", kind_of(value)), kDamaged);
    }
    if (!std::isfinite(number))
      throw BundleError(paths[0], std::string(key), text("expected a finite number, found ", number), kDamaged);
    return number;
  }

  std::string string(std::string_view key, const Value& value) const {
    const auto* s = std::get_if<std::string>(&value);
    if (!s) throw BundleError(paths[0], std::string(key), text("expected a string, found ", kind_of(value)), kDamaged);
    return *s;
  }
};

File::File(const std::string& path) : impl_(std::make_unique<Impl>(path)) {}
File::~File() = default;
File::File(File&&) noexcept = default;

const std::vector<std::string>& File::paths() const { return impl_->paths; }
uint32_t File::version() const { return impl_->shards[0].version; }
const std::vector<std::pair<std::string, Value>>& File::metadata() const { return impl_->shards[0].metadata; }
const std::vector<Tensor>& File::tensors() const { return impl_->tensors; }
const std::vector<std::string>& File::warnings() const { return impl_->warnings; }
const Value* File::find(std::string_view key) const { return impl_->shards[0].find(key); }

uint64_t File::size_on_disk() const {
  uint64_t n_bytes = 0;
  for (const Shard& shard : impl_->shards) n_bytes += shard.file.size();
  return n_bytes;
}

const Tensor* File::find_tensor(std::string_view name) const {
  const auto at = impl_->tensor_index.find(name);
  return at == impl_->tensor_index.end() ? nullptr : &impl_->tensors[at->second];
}

int64_t File::require_int(std::string_view key, int64_t minimum, int64_t maximum) const {
  return int_in_range(impl_->paths[0], key, impl_->require(key), minimum, maximum);
}

int64_t File::int_or(std::string_view key, int64_t fallback, int64_t minimum, int64_t maximum) const {
  const Value* value = find(key);
  return value ? int_in_range(impl_->paths[0], key, *value, minimum, maximum) : fallback;
}

double File::require_float(std::string_view key) const { return impl_->finite(key, impl_->require(key)); }

double File::float_or(std::string_view key, double fallback) const {
  const Value* value = find(key);
  return value ? impl_->finite(key, *value) : fallback;
}

std::string File::require_string(std::string_view key) const { return impl_->string(key, impl_->require(key)); }

std::string File::string_or(std::string_view key, const std::string& fallback) const {
  const Value* value = find(key);
  return value ? impl_->string(key, *value) : fallback;
}

void File::read(const Tensor& tensor, uint64_t from, uint64_t n_bytes, void* out) const {
  if (from > tensor.n_bytes || n_bytes > tensor.n_bytes - from) {
    throw InputError(
        text("tensor '", tensor.name, "' has ", tensor.n_bytes, " bytes, asked for ", n_bytes, " from byte ", from));
  }
  const RegularFile& file = impl_->shards[size_t(tensor.shard)].file;
  const uint64_t got = file.read_at(tensor.offset + from, n_bytes, out);
  if (got < n_bytes) {
    throw BundleError(file.path(), text("tensor '", tensor.name, "'"),
                      text("the file became shorter since it was opened: it ends at byte ", tensor.offset + from + got,
                           ", the tensor ends at byte ", tensor.offset + tensor.n_bytes),
                      "close whatever writes to it, and load the model again");
  }
}

}  // namespace phi4edge::gguf
