#include "gguf/look_alike.h"

#include <algorithm>

namespace phi4edge::gguf {

LookAlike recognize(std::string_view head) {
  using namespace std::string_view_literals;
  const auto starts = [&](std::string_view prefix) { return head.substr(0, prefix.size()) == prefix; };
  const size_t first = std::min(head.find_first_not_of(" \t\r\n\xef\xbb\xbf"), head.size());
  const std::string_view body = head.substr(first);
  constexpr const char* kConvert = "convert the checkpoint to GGUF";
  constexpr const char* kUnpack = "unpack it first";
  constexpr const char* kAgain = "download the file again";
  if (starts("version https://git-lfs")) {
    return {"a Git LFS pointer, not the file itself", "run git lfs pull, or download the file itself"};
  }
  if (starts("PK\x03\x04"sv)) return {"a zip archive, perhaps a PyTorch checkpoint", kConvert};
  if (head.size() > 1 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5) return {"a Python pickle", kConvert};
  if (starts("\x1f\x8b"sv)) return {"a gzip archive", kUnpack};
  if (starts("\x28\xb5\x2f\xfd"sv)) return {"a zstd archive", kUnpack};
  if (head.size() > 8 && head[8] == '{' && head.substr(5, 3) == "\0\0\0"sv) return {"a safetensors file", kConvert};
  if (body.substr(0, 1) == "<") {
    return {"an HTML or XML page, perhaps the error message of a web server", kAgain};
  }
  if (body.substr(0, 1) == "{") return {"JSON text, perhaps the error message of a web server", kAgain};
  for (const char* magic : {"lmgg", "fmgg", "tjgg", "algg", "GGML", "GGMF", "GGJT", "ggml", "ggmf", "ggjt", "GGLA", "ggla"}) {
    if (starts(magic)) return {"a GGML file, the format before GGUF", "download or convert a GGUF file"};
  }
  if (starts("FUGG")) return {"a GGUF file with its bytes swapped", kAgain};
  if (starts("\0\0\0\0"sv)) return {"an empty space, perhaps of a download that did not finish", kAgain};
  return {"no GGUF file", "name a .gguf file"};
}

}  // namespace phi4edge::gguf
