// Files that are often taken for GGUF files.
#pragma once

#include <string_view>

namespace phi4edge::gguf {

struct LookAlike {
  const char* what;  // "a zip archive"
  const char* hint;  // what to do about it
};

LookAlike recognize(std::string_view first_bytes);  // of a file that does not start with "GGUF"; 64 bytes suffice

}  // namespace phi4edge::gguf
