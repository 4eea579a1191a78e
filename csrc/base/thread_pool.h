// A fixed set of threads that run one function together (SPMD), and the barrier they meet at.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/aligned.h"

namespace phi4edge {

// All `size` threads wait for each other.  Spins briefly, then yields, so that a busy machine still makes progress.
// What a thread wrote before wait() is visible to all of them after it.
class SpinBarrier {
 public:
  explicit SpinBarrier(int size);
  void wait();

 private:
  const int size_;
  const int n_spins_;
  // On two cache lines: those who wait poll `phase_`, and must not slow down those who still arrive.
  alignas(kCacheLine) std::atomic<int> arrived_{0};
  alignas(kCacheLine) std::atomic<unsigned> phase_{0};
};

// After fork() the child has none of the threads: run() throws UnsupportedError there when size() > 1; the destructor is safe
// as long as no run() was under way in another thread when the process forked.
class ThreadPool {
 public:
  // 1 or more; the calling thread is one of them.  Throws InputError (out of range) or UnsupportedError (the system refused).
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return n_threads_; }
  // Runs work(thread) for thread = 0..size-1, thread 0 on the caller; returns when all are done.
  // An exception of any thread is rethrown here (the first one); work that uses the barrier must not throw between barriers.
  // Calls from several callers are serialised; work must not call run() of the same pool.
  void run(const std::function<void(int thread)>& work);
  SpinBarrier& barrier() { return barrier_; }

 private:
  struct Signals {
    std::condition_variable start, done;
  };
  class Turn;

  void worker(int thread);
  void run_one(int thread);
  void finish();
  void stop();

  const int n_threads_;
  const pid_t owner_;  // process that has the threads
  const bool spins_;   // there is a core for each thread
  SpinBarrier barrier_;
  std::vector<std::thread> threads_;
  std::mutex run_mutex_;                   // held by the caller of run()
  std::atomic<std::thread::id> runner_{};  // who that is
  std::mutex mutex_;                       // for sleeping and waking only, and for error_
  std::unique_ptr<Signals> signals_;
  const std::function<void(int)>* work_ = nullptr;  // written before generation_, read after it
  std::exception_ptr error_;
  std::atomic<bool> stopping_{false};
  alignas(kCacheLine) std::atomic<uint32_t> generation_{0};  // grows by one with each run(), and once to stop
  alignas(kCacheLine) std::atomic<int> running_{0};          // workers that have not finished this run()
};

}  // namespace phi4edge
