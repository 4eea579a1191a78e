// The types a tensor of a GGUF file may have, with the sizes that make the file checkable; we need not be able to decode them.
#pragma once

#include <cstdint>

namespace phi4edge::gguf {

struct GgmlType {
  uint32_t id;
  const char* name;
  int block_values, block_bytes;  // 0, 0: ggml once had this type and removed it
};

const GgmlType* find_ggml_type(uint32_t id);  // nullptr when unknown

}  // namespace phi4edge::gguf
