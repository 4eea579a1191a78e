// How fast this machine reads memory: the limit of decoding.
#pragma once

#include <cstddef>

namespace phi4edge {

// Bytes per second that n_threads read from n_bytes of memory in all, the median of the passes within `seconds`: neighbours on
// the same memory come and go, and what is compared with it takes its time too.
// Throws InputError for arguments out of range, OutOfMemoryError.
double read_bandwidth(int n_threads, size_t n_bytes, double seconds);

}  // namespace phi4edge
