#include "gguf/regular_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace phi4edge::gguf {

RegularFile::RegularFile(std::string path) : path_(std::move(path)) {
  if (path_.find('\0') != std::string::npos) throw FileError({}, "the file name contains a zero byte");
  struct stat info;
  // Before open(): opening a device can already have an effect.  After it: the name may stand for another file by then.
  if (stat(path_.c_str(), &info) != 0) fail("cannot open", errno);
  check_kind(info.st_mode);
  fd_ = open(path_.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd_ < 0) fail("cannot open", errno);
  const int status = fstat(fd_, &info);
  const int error = errno;
  try {
    if (status != 0) fail("cannot open", error);
    check_kind(info.st_mode);
  } catch (...) {
    close(fd_);
    throw;
  }
  size_ = uint64_t(info.st_size);
}

RegularFile::RegularFile(RegularFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), size_(other.size_) {}

RegularFile::~RegularFile() {
  if (fd_ >= 0) close(fd_);
}

uint64_t RegularFile::read_at(uint64_t offset, uint64_t n_bytes, void* out) const {
  uint64_t done = 0;
  while (done < n_bytes) {
    const size_t piece = size_t(std::min<uint64_t>(n_bytes - done, 1u << 30));
    const ssize_t got = pread(fd_, static_cast<char*>(out) + done, piece, off_t(offset + done));
    if (got == 0) break;
    if (got > 0) {
      done += uint64_t(got);
    } else if (errno != EINTR) {
      fail("cannot read", errno);
    }
  }
  return done;
}

void RegularFile::fail(const char* what, int error) const {
  throw FileError(path_, text(what, ": ", std::generic_category().message(error)));
}

void RegularFile::check_kind(mode_t mode) const {
  if (S_ISREG(mode)) return;
  const char* kind = S_ISDIR(mode) ? "a directory" : S_ISFIFO(mode) ? "a pipe" : S_ISSOCK(mode) ? "a socket" : "a device";
  throw FileError(path_, text("this is ", kind, ", not a file"), "name a .gguf file");
}

}  // namespace phi4edge::gguf
