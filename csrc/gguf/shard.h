// One GGUF file, be it whole or a part of a split model.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gguf/cursor.h"
#include "gguf/gguf.h"
#include "gguf/regular_file.h"

namespace phi4edge::gguf {

// One file: everything in it is checked by the constructor.
class Shard {
 public:
  Shard(const std::string& path, int index);  // index: for Tensor::shard

  const Value* find(std::string_view key) const;  // nullptr when absent

  RegularFile file;
  uint32_t version = 0;
  std::vector<std::pair<std::string, Value>> metadata;
  std::vector<Tensor> tensors;
  std::vector<std::string> warnings;

 private:
  void read_start(Cursor& in);
  void read_key(Cursor& in, uint64_t i);
  void read_tensor(Cursor& in, uint64_t i);
  void lay_out(uint64_t header_bytes);

  int index_;
  uint64_t n_tensors_ = 0, n_keys_ = 0, alignment_ = 32;
  std::map<std::string, size_t, std::less<>> key_index_;
};

}  // namespace phi4edge::gguf
