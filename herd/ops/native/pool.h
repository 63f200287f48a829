// One pool of threads, made once. A job is cut into numbered tasks; which thread runs a task never changes a result.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define HERD_PAUSE() _mm_pause()
#define HERD_FETCH(p) _mm_prefetch(p, _MM_HINT_T1)
#else
#define HERD_FETCH(p) __builtin_prefetch(p, 0, 2)
#define HERD_PAUSE() std::this_thread::yield()
#endif

namespace herd {

// A plain function, so that no allocation stands between two small products.
using Task = void (*)(void* context, int64_t task, int worker);

// A lock that is handed on in the order in which it was asked for. With a plain one, an engine that comes straight back for its next step
// finds it free before the engine that waits has woken up, and takes it again.
class Turns {
 public:
  void lock() {
    std::unique_lock<std::mutex> held(mutex_);
    const uint64_t mine = last_++;
    wake_.wait(held, [&] { return now_ == mine; });
  }

  void unlock() {
    std::lock_guard<std::mutex> held(mutex_);
    ++now_;
    wake_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  uint64_t last_ = 0, now_ = 0;  // the next turn to give away, and the one whose turn it is
};

// What a thread will read in the next job, as far as is known. It fetches that into its second cache while it waits for the others. A place and
// a length that do not belong together, read while they change, name memory that nobody asked for: fetching does no harm anywhere.
class Ahead {
 public:
  static constexpr int kRanges = 3;

  // An empty range ends the list.
  void set(int i, const void* from, int64_t count) {
    from_[i].store(static_cast<const char*>(from), std::memory_order_relaxed);
    bytes_[i].store(count, std::memory_order_relaxed);
  }

 private:
  friend class Fetch;
  std::atomic<const char*> from_[kRanges] = {};
  std::atomic<int64_t> bytes_[kRanges] = {};
};

class Fetch {  // by one thread
 public:
  explicit Fetch(const Ahead& ahead) : ahead_(ahead) {}

  void restart() { next_ = at_ = bytes_ = 0; }

  // Ask for a few lines; false when there is nothing left to ask for.
  bool more() {
    if (at_ >= bytes_) {
      if (next_ == Ahead::kRanges || (bytes_ = ahead_.bytes_[next_].load(std::memory_order_relaxed)) == 0) {
        next_ = Ahead::kRanges;
        return false;
      }
      from_ = ahead_.from_[next_].load(std::memory_order_relaxed), at_ = 0, ++next_;
    }
    for (int i = 0; i < 4; ++i, at_ += 64) HERD_FETCH(from_ + at_);
    return true;
  }

 private:
  const Ahead& ahead_;
  int64_t next_ = Ahead::kRanges, at_ = 0, bytes_ = 0;
  const char* from_ = nullptr;
};

// A job is one number: how many of its tasks nobody has taken yet, under a generation. Whoever lowers it by one has a task of a job that
// is still alive, since a job lives until its last task is done. So the caller waits for tasks, never for a thread: one that the
// system has put aside costs nothing.
class Pool {
 public:
  ~Pool() { resize(1); }

  int size() const { return int(threads_.size()) + 1; }

  // Must not be called while a job runs, nor from two threads.
  void resize(int count) {
    stopping_.store(true);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    stopping_.store(false);
    ahead_.reset(new Ahead[size_t(count)]);
    for (int worker = 1; worker < count; ++worker) threads_.emplace_back([this, worker] { work(worker); });
  }

  // To be told before the job is run after which it holds.
  Ahead& ahead(int worker) { return ahead_[size_t(worker)]; }

  // Run tasks 0 .. count-1 and return when all are done. Not from two threads at once.
  void run(Task task, void* context, int64_t count) {
    if (threads_.empty() || count == 1) {
      for (int64_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    task_ = task, context_ = context, count_ = count;
    done_.store(0, std::memory_order_relaxed);
    generation_ += uint64_t(1) << 32;
    open_.store(generation_ | uint64_t(count));  // sequentially consistent with `sleepers_`: a thread falls asleep or sees the job
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    while (take(0)) {
    }
    Fetch fetch(ahead_[0]);
    fetch.restart();
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      if (fetch.more()) continue;
      if (spins < kSpins) HERD_PAUSE();
      else std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 20000;  // some hundred microseconds: longer than the gap between two products of a step

  bool take(int worker) {
    uint64_t open = open_.load(std::memory_order_acquire);
    do {
      if (uint32_t(open) == 0) return false;
    } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire));
    task_(context_, count_ - uint32_t(open), worker);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void work(int worker) {
    int spins = 0;
    Fetch fetch(ahead_[size_t(worker)]);
    while (!stopping_.load(std::memory_order_relaxed)) {
      if (take(worker)) {
        spins = 0;
        fetch.restart();
      } else if (fetch.more()) {
      } else if (++spins < kSpins) {
        HERD_PAUSE();
      } else {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return stopping_.load() || uint32_t(open_.load()) != 0; });
        sleepers_.fetch_sub(1);
        spins = 0;
      }
    }
  }

  std::vector<std::thread> threads_;
  std::unique_ptr<Ahead[]> ahead_{new Ahead[1]};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> open_{0};  // generation << 32 | tasks that nobody has taken
  std::atomic<int64_t> done_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  uint64_t generation_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace herd
