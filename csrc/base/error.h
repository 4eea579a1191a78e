// Errors that reach the user.  Each says where (path), what (field), what happened, and what to do about it.
// module.cc turns them into the exception tree of phi4edge/errors.py.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace phi4edge {

class Error : public std::runtime_error {
 public:
  enum class Kind { kBundle, kFile, kInput, kUnsupported, kOutOfMemory, kCancelled };

  Error(Kind kind, std::string path, std::string field, const std::string& problem, std::string hint)
      : std::runtime_error(problem), kind_(kind), path_(std::move(path)), field_(std::move(field)), hint_(std::move(hint)) {}

  Kind kind() const { return kind_; }
  const std::string& path() const { return path_; }
  const std::string& field() const { return field_; }
  const std::string& hint() const { return hint_; }

 private:
  Kind kind_;
  std::string path_, field_, hint_;
};

// A model file that is damaged, truncated, or of a kind that we cannot read.
struct BundleError : Error {
  BundleError(std::string path, std::string field, const std::string& problem, std::string hint = {})
      : Error(Kind::kBundle, std::move(path), std::move(field), problem, std::move(hint)) {}
};

// The operating system refused the file: missing, a directory, no permission.
struct FileError : Error {
  FileError(std::string path, const std::string& problem, std::string hint = {})
      : Error(Kind::kFile, std::move(path), {}, problem, std::move(hint)) {}
};

// An argument of the caller that we cannot use.
struct InputError : Error {
  explicit InputError(const std::string& problem, std::string hint = {})
      : Error(Kind::kInput, {}, {}, problem, std::move(hint)) {}
};

// This CPU or this build cannot do it.
struct UnsupportedError : Error {
  explicit UnsupportedError(const std::string& problem, std::string hint = {})
      : Error(Kind::kUnsupported, {}, {}, problem, std::move(hint)) {}
};

struct OutOfMemoryError : Error {
  explicit OutOfMemoryError(const std::string& problem, std::string hint = {})
      : Error(Kind::kOutOfMemory, {}, {}, problem, std::move(hint)) {}
};

// The caller asked to stop; nothing was changed.
struct CancelledError : Error {
  CancelledError() : Error(Kind::kCancelled, {}, {}, "cancelled", {}) {}
};

}  // namespace phi4edge
