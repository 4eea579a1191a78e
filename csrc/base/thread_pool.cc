// Waiting has two stages, here and in the barrier: spin, because the next token follows within microseconds, then sleep or
// yield, because an idle pool must cost nothing.
#include "base/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <chrono>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace phi4edge {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kBarrierSpins = 2000;  // 20 to 100 us, depending on how long the CPU takes for a pause
constexpr auto kPoolSpin = std::chrono::microseconds(50);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ __volatile__("yield" ::: "memory");
#endif
}

// Cores that this process may use; 0 when unknown.
int usable_cores() {
#if defined(__linux__)
  cpu_set_t cores;  // hardware_concurrency() does not look at the affinity with every C library
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
#endif
  return int(std::thread::hardware_concurrency());
}

// With fewer cores than threads, the one we wait for may need the core that we spin on.
bool has_core_for_each(int n_threads) {
  const int n_cores = usable_cores();
  return n_cores == 0 || n_threads <= n_cores;
}

// True as soon as ready(); false when kPoolSpin is over.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kPoolSpin;
  do {
    for (int spin = 0; spin < 64; ++spin) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

int checked_size(int n_threads) {
  if (n_threads < 1 || n_threads > kMaxThreads) {
    throw InputError(text("the number of threads is ", n_threads, ", expected 1 to ", kMaxThreads));
  }
  return n_threads;
}

}  // namespace

SpinBarrier::SpinBarrier(int size) : size_(size), n_spins_(has_core_for_each(size) ? kBarrierSpins : 16) {}

void SpinBarrier::wait() {
  if (size_ == 1) return;
  // Read before we arrive: from then on the last thread may advance it at any time.
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);  // nobody arrives again before the phase changes
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) {
    if (spin < n_spins_) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

ThreadPool::ThreadPool(int n_threads)
    : n_threads_(checked_size(n_threads)),
      owner_(getpid()),
      spins_(has_core_for_each(n_threads)),
      barrier_(n_threads),
      signals_(std::make_unique<Signals>()) {
  threads_.reserve(size_t(n_threads - 1));
  try {
    for (int thread = 1; thread < n_threads; ++thread) threads_.emplace_back(&ThreadPool::worker, this, thread);
  } catch (const std::system_error& error) {
    stop();
    throw UnsupportedError(text("cannot start ", n_threads, " threads: ", error.what()), "use fewer threads");
  } catch (...) {
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() == owner_) {
    stop();
  } else {
    // The threads exist in the parent only.  A join would wait for ever, and so would the destructor of a condition
    // variable, which believes that they still sleep on it.
    for (auto& thread : threads_) thread.detach();
    (void)signals_.release();
  }
}

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  {
    std::lock_guard lock(mutex_);
  }  // whoever saw the old generation is asleep now, and hears us
  signals_->start.notify_all();
  for (auto& thread : threads_) thread.join();
  threads_.clear();
}

// Holds run() for one caller, and remembers which thread that is.
class ThreadPool::Turn {
 public:
  explicit Turn(ThreadPool& pool) : pool_(pool), lock_(pool.run_mutex_) { pool_.runner_.store(std::this_thread::get_id()); }
  ~Turn() { pool_.runner_.store({}); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  ThreadPool& pool_;
  std::lock_guard<std::mutex> lock_;
};

void ThreadPool::run(const std::function<void(int)>& work) {
  if (runner_.load() == std::this_thread::get_id()) {
    throw InputError("this model is at work in this very thread", "a progress function must not use the model that calls it");
  }
  if (n_threads_ == 1) {
    const Turn turn(*this);
    work(0);
    return;
  }
  if (getpid() != owner_) {
    throw UnsupportedError("the threads of this model belong to the process that loaded it",
                           "load the model again after fork(), or start the process with 'spawn'");
  }
  const Turn turn(*this);
  work_ = &work;
  error_ = nullptr;
  running_.store(n_threads_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  {
    std::lock_guard lock(mutex_);
  }
  signals_->start.notify_all();
  run_one(0);

  const auto all_done = [this] { return running_.load(std::memory_order_acquire) == 0; };
  if (!spins_ || !spin_until(all_done)) {
    std::unique_lock lock(mutex_);
    signals_->done.wait(lock, all_done);
  }
  work_ = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadPool::run_one(int thread) {
  try {
    (*work_)(thread);
  } catch (...) {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::finish() {
  if (running_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  {
    std::lock_guard lock(mutex_);
  }
  signals_->done.notify_one();
}

void ThreadPool::worker(int thread) {
  uint32_t seen = 0;  // run() cannot be called before the constructor is done, so the first generation is 1
  for (;;) {
    const auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!spins_ || !spin_until(changed)) {
      std::unique_lock lock(mutex_);
      signals_->start.wait(lock, changed);
    }
    if (stopping_.load(std::memory_order_relaxed)) return;
    ++seen;  // the next run() waits for us, so we never miss one
    run_one(thread);
    finish();
  }
}

}  // namespace phi4edge
