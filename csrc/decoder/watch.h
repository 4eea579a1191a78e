// Whether a computation of one or several sessions is to go on.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <utility>
#include <vector>

#include "base/error.h"

namespace phi4edge {

// Tokens done, tokens to do in this call; returns false to cancel.  Called on the caller's thread.
using ForwardProgress = std::function<bool(int64_t done, int64_t total)>;

class Watch {
 public:
  // cancelled: flags of which any one ends the computation, set from other threads.
  Watch(const ForwardProgress& progress, int64_t total, std::vector<const std::atomic<bool>*> cancelled)
      : progress_(progress), total_(total), cancelled_(std::move(cancelled)) {}

  // Asks the caller, at most every 50 ms; signal handlers and progress bars live there.
  bool should_stop() {
    for (const std::atomic<bool>* flag : cancelled_) {
      if (flag->load(std::memory_order_relaxed)) return true;
    }
    if (!progress_) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_check_ < std::chrono::milliseconds(50)) return false;
    last_check_ = now;
    try {
      return !progress_(done_, total_);
    } catch (...) {  // this is between two barriers, where the other threads would wait for ever
      error_ = std::current_exception();
      return true;
    }
  }

  // After should_stop() said yes.
  [[noreturn]] void throw_reason() {
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    throw CancelledError();
  }

  void advance(int64_t n_tokens) { done_ += n_tokens; }

  void finish() const {
    if (progress_ && !progress_(done_, total_)) throw CancelledError();
  }

 private:
  const ForwardProgress& progress_;
  const int64_t total_;
  const std::vector<const std::atomic<bool>*> cancelled_;
  int64_t done_ = 0;
  std::chrono::steady_clock::time_point last_check_ = std::chrono::steady_clock::now();
  std::exception_ptr error_;
};

}  // namespace phi4edge
