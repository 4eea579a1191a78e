#include "gguf/shard.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "base/checked.h"
#include "gguf/ggml_types.h"
#include "gguf/look_alike.h"
#include "gguf/value.h"

namespace phi4edge::gguf {
namespace {

constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxKeys = 65536;
constexpr uint64_t kMaxTensors = 1ull << 20;
constexpr uint64_t kMaxTensorNameBytes = 63;
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMinAlignment = 8, kMaxAlignment = 4096;
constexpr uint64_t kMinKeyEntryBytes = 8 + 1 + 4 + 1;             // length, one character, type, one byte
constexpr uint64_t kMinTensorEntryBytes = 8 + 1 + 4 + 8 + 4 + 8;  // length, one character, one dimension, type, offset

bool is_printable_ascii(std::string_view s) {
  return std::all_of(s.begin(), s.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
}

[[noreturn]] void fail(const RegularFile& file, const Tensor& tensor, const std::string& problem, const char* hint = kDamaged) {
  throw BundleError(file.path(), text("tensor '", tensor.name, "'"), problem, hint);
}

}  // namespace

Shard::Shard(const std::string& path, int index) : file(path), index_(index) {
  Cursor in(file);
  read_start(in);
  for (uint64_t i = 0; i < n_keys_; ++i) read_key(in, i);
  tensors.reserve(size_t(n_tensors_));
  for (uint64_t i = 0; i < n_tensors_; ++i) read_tensor(in, i);
  lay_out(in.position());
}

const Value* Shard::find(std::string_view key) const {
  const auto at = key_index_.find(key);
  return at == key_index_.end() ? nullptr : &metadata[at->second].second;
}

void Shard::read_start(Cursor& in) {
  in.enter("magic");
  char head[64];
  const auto n_head = file.read_at(0, std::min<uint64_t>(file.size(), sizeof(head)), head);
  in.require(4);
  if (n_head < 4 || std::memcmp(head, "GGUF", 4) != 0) {
    const LookAlike found = recognize({head, size_t(n_head)});
    in.fail(text("expected a GGUF file, this is ", found.what), found.hint);
  }
  in.number<uint32_t>();
  in.enter("version");
  version = in.number<uint32_t>();
  if (version != 0 && (version & 0xffff) == 0) {
    in.fail(text("version ", version, ": the file is big-endian"),
            "swap its bytes with gguf-convert-endian, or get a little-endian file");
  }
  if (version < 2 || version > 3) {
    in.fail(text("version ", version, ", supported are 2 and 3"),
            version > 3 ? "update phi4edge, or convert the model with an older tool"
                        : "convert the model again with a current tool");
  }
  const auto count = [&in](const char* field, uint64_t min_entry_bytes, uint64_t limit) {
    in.enter(field);
    const auto n = in.number<uint64_t>();
    const uint64_t room = in.remaining() / min_entry_bytes;
    if (n > limit) in.fail(text("announces ", n, " entries, the limit is ", limit));
    // n_keys and all entries follow n_tensors; the room is a few entries too large there, which is all right.
    if (n > room) in.fail(text("truncated header: announces ", n, " entries, the file has room for ", room), kIncomplete);
    return n;
  };
  n_tensors_ = count("n_tensors", kMinTensorEntryBytes, kMaxTensors);
  n_keys_ = count("n_keys", kMinKeyEntryBytes, kMaxKeys);
}

void Shard::read_key(Cursor& in, uint64_t i) {
  in.enter(text("key ", i));
  std::string key = in.string(kMaxKeyBytes, "a key");
  if (key.empty()) in.fail("an empty key");
  if (!is_printable_ascii(key)) in.fail("a key that is not printable ASCII");
  in.enter(key.size() <= 256 ? key : key.substr(0, 256) + "...");
  if (!key_index_.emplace(key, metadata.size()).second) in.fail("the key appears twice");
  const auto type = in.number<uint32_t>();
  Value value = read_value(in, type);
  if (key == "general.alignment") {
    if (type != kU32) in.fail(text("value type ", type, ", expected ", uint32_t(kU32), " (unsigned, 32 bits)"));
    alignment_ = std::get<uint64_t>(value);
    if (!std::has_single_bit(alignment_) || alignment_ < kMinAlignment || alignment_ > kMaxAlignment) {
      in.fail(text(alignment_, " is not a power of two from ", kMinAlignment, " to ", kMaxAlignment));
    }
  }
  metadata.emplace_back(std::move(key), std::move(value));
}

void Shard::read_tensor(Cursor& in, uint64_t i) {
  in.enter(text("tensor ", i));
  Tensor tensor;
  tensor.shard = index_;
  tensor.name = in.string(kMaxTensorNameBytes, "a tensor name");
  if (tensor.name.empty()) in.fail("an empty tensor name");
  if (!is_printable_ascii(tensor.name)) in.fail("a tensor name that is not printable ASCII");
  in.enter(text("tensor '", tensor.name, "'"));
  if (tensor.name.find("../") != std::string::npos) in.fail("the name contains '../'");

  const auto n_dims = in.number<uint32_t>();
  if (n_dims < 1 || n_dims > kMaxDims) in.fail(text(n_dims, " dimensions, expected 1 to ", kMaxDims));
  int64_t n_values = 1;
  for (uint32_t d = 0; d < n_dims; ++d) {
    const auto size = int64_t(in.number<uint64_t>());
    if (size < 1) in.fail(text("dimension ", d, " is ", size));
    if (__builtin_mul_overflow(n_values, size, &n_values)) in.fail("the product of the dimensions does not fit in 63 bits");
    tensor.shape.push_back(size);
  }

  tensor.type_id = in.number<uint32_t>();
  const GgmlType* type = find_ggml_type(tensor.type_id);
  if (!type) {
    in.fail(text("unsupported type ", tensor.type_id), "update phi4edge, or get the model in another format such as Q4_K_M");
  }
  if (!type->block_values) {
    in.fail(text("unsupported type ", type->id, " (", type->name, "), which ggml removed"),
            "convert the model again with a current tool");
  }
  if (tensor.shape[0] % type->block_values != 0) {
    in.fail(text("rows of ", tensor.shape[0], " values, not a multiple of the ", type->block_values, " of a ", type->name,
                 " block"));
  }
  int64_t n_bytes;
  if (__builtin_mul_overflow(n_values / type->block_values, int64_t(type->block_bytes), &n_bytes)) {
    in.fail("the size in bytes does not fit in 63 bits");
  }
  tensor.n_bytes = uint64_t(n_bytes);
  tensor.offset = in.number<uint64_t>();  // from the start of the data; lay_out() makes it one from the start of the file
  tensors.push_back(std::move(tensor));
}

// Tensors follow each other in the order of the directory, each padded to the alignment.
void Shard::lay_out(uint64_t header_bytes) {
  const uint64_t data_start = *checked_align(header_bytes, alignment_);  // the header is small
  uint64_t expected = 0, end = header_bytes;
  for (Tensor& tensor : tensors) {
    if (tensor.offset % alignment_ != 0) {
      fail(file, tensor, text("offset ", tensor.offset, " is not a multiple of ", alignment_));
    }
    if (tensor.offset != expected) {
      const char* problem = tensor.offset < expected ? ", overlapping the tensor before it, which ends at "
                                                     : ", leaving a hole after the tensor before it, which ends at ";
      fail(file, tensor, text("offset ", tensor.offset, problem, expected));
    }
    const auto start = checked_add(data_start, expected);
    const auto stop = start ? checked_add(*start, tensor.n_bytes) : std::nullopt;
    const auto next = checked_add(expected, tensor.n_bytes);
    const auto padded = next ? checked_align(*next, alignment_) : std::nullopt;
    if (!stop || !padded) fail(file, tensor, "the end of its data does not fit in 64 bits");
    tensor.offset = *start;
    expected = *padded;
    end = *stop;
  }
  if (end > file.size()) {
    const auto cut = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const Tensor& tensor) { return tensor.offset + tensor.n_bytes > file.size(); });
    fail(file, *cut,
         text("the file is ", end - file.size(), " bytes short: the tensor ends at byte ", cut->offset + cut->n_bytes,
              ", the file has ", file.size()),
         kIncomplete);
  }
  const auto padded_end = checked_align(end, alignment_);
  if (padded_end && file.size() > *padded_end) {
    warnings.push_back(text(file.path(), ": ", file.size() - *padded_end, " bytes after the last tensor are not used"));
  }
}

}  // namespace phi4edge::gguf
