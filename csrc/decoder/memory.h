// How much memory a session takes, how much there is, and an error before the one is larger than the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "decoder/config.h"

namespace phi4edge {

// In bytes.
struct MemoryNeed {
  uint64_t weights = 0, kv_cache = 0, scratch = 0;

  uint64_t total() const { return weights + kv_cache + scratch; }
};

// Bytes that this process can still take without swapping: free memory of the machine, or less where a container (cgroup) or
// `ulimit -v` limits it.  UINT64_MAX when the system does not tell.  `root` goes before /proc and /sys, for tests.
uint64_t available_memory(const std::string& root = "");

// Throws OutOfMemoryError with all the numbers and what to change.
void require_memory(const MemoryNeed& need, uint64_t available);
void require_adapter_memory(uint64_t n_bytes, uint64_t available);

}  // namespace phi4edge
