#include "base/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace phi4edge {
namespace {

// Eight independent sums of 64-bit words keep enough loads in flight; prefetching reaches past the page a plain loop is on.
uint64_t read_all(const uint64_t* words, size_t n_words) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= n_words; i += 8) {
    __builtin_prefetch(words + i + 1024);
    for (int j = 0; j < 8; ++j) sums[j] += words[i + size_t(j)];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double read_bandwidth(int n_threads, size_t n_bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  if (n_threads < 1 || n_bytes < 4096 || !(seconds > 0 && seconds <= 60)) {
    throw InputError("read_bandwidth: wants 1 or more threads, 4096 or more bytes, and up to 60 seconds");
  }
  ThreadPool pool(n_threads);
  const size_t n_words = n_bytes / sizeof(uint64_t) / size_t(n_threads);  // per thread
  const auto data = allocate_in_large_pages<uint64_t>(n_words * size_t(n_threads), "the bandwidth measurement");
  pool.run([&](int thread) { std::fill_n(data.get() + n_words * size_t(thread), n_words, uint64_t(thread + 1)); });
  std::atomic<uint64_t> sink{0};
  std::vector<double> rates;
  for (const auto start = Clock::now(); Clock::now() - start < std::chrono::duration<double>(seconds);) {
    const auto begin = Clock::now();
    pool.run([&](int thread) { sink += read_all(data.get() + n_words * size_t(thread), n_words); });
    const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    rates.push_back(double(n_words * size_t(n_threads) * sizeof(uint64_t)) / elapsed);
  }
  const auto middle = rates.begin() + ptrdiff_t(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

}  // namespace phi4edge
