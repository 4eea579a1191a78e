// Files opened for reading, without surprises.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

namespace phi4edge::gguf {

// An open file that is certain to be a regular one.  Opening never blocks.
class RegularFile {
 public:
  explicit RegularFile(std::string path);  // throws FileError
  RegularFile(RegularFile&& other) noexcept;
  ~RegularFile();

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }  // when it was opened

  // Returns the number of bytes read, less than n_bytes only at the end of the file.  Safe from several threads at once.
  uint64_t read_at(uint64_t offset, uint64_t n_bytes, void* out) const;

 private:
  [[noreturn]] void fail(const char* what, int error) const;
  void check_kind(mode_t mode) const;

  std::string path_;
  int fd_ = -1;
  uint64_t size_ = 0;
};

}  // namespace phi4edge::gguf
