// GGUF files (versions 2 and 3, one file or split in shards): bounds-checked metadata and tensor directory.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
//
// Everything is validated before it is used or allocated.  Tensor data are read with pread(), not mapped: weights are
// repacked while they are loaded, so a map would save nothing, and a file truncated under a map kills the process.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace phi4edge::gguf {

struct Array;
// Integers keep their sign and width class only: unsigned, signed, float, double as in the file.
using Value = std::variant<uint64_t, int64_t, double, bool, std::string, std::shared_ptr<const Array>>;

// Arrays hold one element kind; nested arrays are refused.
struct Array {
  std::variant<std::vector<uint64_t>, std::vector<int64_t>, std::vector<double>, std::vector<bool>, std::vector<std::string>>
      items;
  size_t size() const;
};

struct Tensor {
  std::string name;
  uint32_t type_id = 0;        // ggml type
  std::vector<int64_t> shape;  // ggml order: shape[0] is the row length; 1 to 4 entries
  int shard = 0;               // index into File::paths()
  uint64_t offset = 0;         // bytes from the start of that shard
  uint64_t n_bytes = 0;

  int64_t n_columns() const { return shape[0]; }
  int64_t n_rows() const;  // product of the other dimensions
};

class File {
 public:
  // Opens and validates the file and, when it is one of several shards, its siblings.
  // Throws FileError (cannot open, a directory, not a regular file) or BundleError (anything wrong inside).
  explicit File(const std::string& path);
  ~File();
  File(File&&) noexcept;
  File(const File&) = delete;

  const std::vector<std::string>& paths() const;
  uint32_t version() const;
  uint64_t size_on_disk() const;                                       // all shards
  const std::vector<std::pair<std::string, Value>>& metadata() const;  // in file order
  const std::vector<Tensor>& tensors() const;                          // in file order
  const std::vector<std::string>& warnings() const;                    // e.g. trailing bytes after the last tensor

  const Value* find(std::string_view key) const;           // nullptr when absent
  const Tensor* find_tensor(std::string_view name) const;  // nullptr when absent

  // Typed look-up.  A present key of the wrong kind, or out of range, is a BundleError that names it.
  // Integers of any width and sign are accepted where the value fits.
  int64_t require_int(std::string_view key, int64_t minimum, int64_t maximum) const;
  int64_t int_or(std::string_view key, int64_t fallback, int64_t minimum, int64_t maximum) const;
  double require_float(std::string_view key) const;  // finite; integers are accepted
  double float_or(std::string_view key, double fallback) const;
  std::string string_or(std::string_view key, const std::string& fallback) const;
  std::string require_string(std::string_view key) const;

  // Copies n_bytes of the tensor's data, from byte `from` of the tensor, to `out`.  Safe from several threads at once.
  // Throws BundleError when the file became shorter since it was opened.
  void read(const Tensor& tensor, uint64_t from, uint64_t n_bytes, void* out) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace phi4edge::gguf
