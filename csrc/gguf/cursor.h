// Reads a GGUF header front to back, with every limit checked before it matters.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "gguf/regular_file.h"

namespace phi4edge::gguf {

static_assert(std::endian::native == std::endian::little, "numbers are read as they lie in the file");

inline constexpr uint64_t kMaxHeaderBytes = 256ull << 20;
inline constexpr uint64_t kMaxStringBytes = 16ull << 20;
inline constexpr uint64_t kMaxArrayItems = 64ull << 20;  // all arrays of a file together; 8 bytes or more each in memory

inline constexpr const char* kDamaged = "the file is damaged: download or convert it again";
inline constexpr const char* kIncomplete = "the file is incomplete: download it again";

// Nothing is returned, nor allocated, that the file does not hold.
class Cursor {
 public:
  explicit Cursor(const RegularFile& file) : file_(file) {}

  void enter(std::string field) { field_ = std::move(field); }  // for messages: what is read from here on
  uint64_t position() const { return position_; }
  uint64_t remaining() const { return std::min(file_.size(), kMaxHeaderBytes) - position_; }

  [[noreturn]] void fail(const std::string& problem, const char* hint = kDamaged) const {
    throw BundleError(file_.path(), field_, problem, hint);
  }

  void require(uint64_t n_bytes) const {
    if (n_bytes > file_.size() - position_) {
      fail(text("truncated header: needs ", n_bytes, " bytes at byte ", position_, ", the file has ", file_.size()),
           kIncomplete);
    }
    if (n_bytes > kMaxHeaderBytes - position_) {
      fail(text("the header is larger than ", kMaxHeaderBytes, " bytes: needs ", n_bytes, " more at byte ", position_));
    }
  }

  void copy(void* out, uint64_t n_bytes) {
    require(n_bytes);
    for (auto* to = static_cast<char*>(out); n_bytes > 0;) {
      if (next_ == end_) refill();
      const size_t piece = size_t(std::min<uint64_t>(n_bytes, end_ - next_));
      std::memcpy(to, buffer_.data() + next_, piece);
      to += piece, next_ += piece, position_ += piece, n_bytes -= piece;
    }
  }

  template <class T>
  T number() {
    T value;
    copy(&value, sizeof(value));
    return value;
  }

  std::string string(uint64_t max_bytes, const char* what) {
    const auto n_bytes = number<uint64_t>();
    if (n_bytes > max_bytes) fail(text(what, " of ", n_bytes, " bytes, the limit is ", max_bytes));
    require(n_bytes);
    std::string value(size_t(n_bytes), '\0');
    copy(value.data(), n_bytes);
    return value;
  }

  bool boolean() {
    const auto value = number<uint8_t>();
    if (value > 1) fail(text("a boolean is ", int(value), ", expected 0 or 1"));
    return value == 1;
  }

  // Takes `count` items out of what the arrays of this file may hold together.
  void count_array_items(uint64_t count, uint64_t min_item_bytes) {
    if (count > array_items_left_) {
      fail(text("an array of ", count, " items, the limit of all arrays together is ", kMaxArrayItems));
    }
    if (count > remaining() / min_item_bytes) {
      fail(text("truncated header: an array of ", count, " items, the file has room for ", remaining() / min_item_bytes),
           kIncomplete);
    }
    array_items_left_ -= count;
  }

 private:
  void refill() {
    if (buffer_.empty()) buffer_.resize(256 << 10);
    next_ = 0;
    end_ = size_t(file_.read_at(position_, buffer_.size(), buffer_.data()));
    if (end_ == 0) fail(text("truncated header: the file ended at byte ", position_, " while it was read"), kIncomplete);
  }

  const RegularFile& file_;
  std::string field_;
  uint64_t position_ = 0;
  uint64_t array_items_left_ = kMaxArrayItems;
  std::vector<char> buffer_;
  size_t next_ = 0, end_ = 0;
};

}  // namespace phi4edge::gguf
