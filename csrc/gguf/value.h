// The values of GGUF metadata.
#pragma once

#include "gguf/cursor.h"
#include "gguf/gguf.h"

namespace phi4edge::gguf {

enum ValueType : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64, kEndOfTypes };

// Reads a value of that type; an array brings its element type and count with it.
Value read_value(Cursor& in, uint32_t type);

const char* kind_of(const Value& value);  // for messages: "a string"
bool same(const Value& a, const Value& b);

// The value as an integer, whatever its width and sign in the file.  Otherwise throws BundleError naming path and key.
int64_t int_in_range(const std::string& path, std::string_view key, const Value& value, int64_t minimum, int64_t maximum);

}  // namespace phi4edge::gguf
