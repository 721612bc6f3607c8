#ifndef LARDER_TESTS_TESTING_MANUAL_EXECUTOR_H_
#define LARDER_TESTS_TESTING_MANUAL_EXECUTOR_H_

#include <cstdint>
#include <deque>
#include <map>
#include <random>
#include <utility>

#include "absl/synchronization/mutex.h"

#include "store/executor.h"
#include "tests/testing/manual_clock.h"

namespace larder {

// Runs tasks only when a test says so, on the test's thread; in posting order,
// or in an order drawn from a seed. Posting is thread-safe.
class ManualExecutor final : public Executor {
 public:
  explicit ManualExecutor(ManualClock& clock) : clock_(clock) {}

  void Post(Task task) override {
    absl::MutexLock lock(&mu_);
    ready_.push_back(std::move(task));
  }
  void PostAt(absl::Time when, Task task) override {
    absl::MutexLock lock(&mu_);
    later_.emplace(when, std::move(task));
  }

  // From now on RunOne picks at random.
  void Shuffle(uint64_t seed) {
    absl::MutexLock lock(&mu_);
    shuffle_ = true;
    random_.seed(seed);
  }

  // Runs one task that is due; false if there is none.
  bool RunOne() {
    Task task;
    {
      absl::MutexLock lock(&mu_);
      const absl::Time now = clock_.Now();
      while (!later_.empty() && later_.begin()->first <= now) {
        ready_.push_back(std::move(later_.begin()->second));
        later_.erase(later_.begin());
      }
      if (ready_.empty()) return false;
      auto it = ready_.begin();
      if (shuffle_) it += static_cast<ptrdiff_t>(random_() % ready_.size());
      task = std::move(*it);
      ready_.erase(it);
    }
    std::move(task)();
    return true;
  }

  // Runs until nothing is due at the present time. Returns how many ran.
  size_t RunAll() {
    size_t count = 0;
    while (RunOne()) ++count;
    return count;
  }

  // Forgets every task, as the end of a process does.
  void DropAll() {
    std::deque<Task> ready;
    std::multimap<absl::Time, Task> later;
    absl::MutexLock lock(&mu_);
    ready.swap(ready_);
    later.swap(later_);
  }

  // When the next task falls due; InfiniteFuture if none waits.
  absl::Time NextTime() const {
    absl::MutexLock lock(&mu_);
    if (!ready_.empty()) return clock_.Now();
    return later_.empty() ? absl::InfiniteFuture() : later_.begin()->first;
  }

  // Runs everything up to `when`, moving the clock from task to task.
  void RunUntil(absl::Time when) {
    for (;;) {
      RunAll();
      const absl::Time next = NextTime();
      if (next > when) break;
      clock_.AdvanceTo(next);
    }
    clock_.AdvanceTo(when);
    RunAll();
  }

 private:
  ManualClock& clock_;
  mutable absl::Mutex mu_;
  std::deque<Task> ready_ ABSL_GUARDED_BY(mu_);
  std::multimap<absl::Time, Task> later_ ABSL_GUARDED_BY(mu_);
  bool shuffle_ ABSL_GUARDED_BY(mu_) = false;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_MANUAL_EXECUTOR_H_
