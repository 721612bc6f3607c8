#include "store/executor.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <queue>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/clock.h"

namespace larder {
namespace {

class ThreadPool final : public Executor {
 public:
  ThreadPool(const std::string& name, size_t threads, int niceness) {
    for (size_t i = 0; i < std::max<size_t>(threads, 1); ++i) {
      threads_.emplace_back([this, name, niceness] {
        pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
        if (niceness != 0) {
          setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)),
                      niceness);
        }
        Work();
      });
    }
    threads_.emplace_back([this, name] {
      pthread_setname_np(pthread_self(), (name.substr(0, 12) + "-t").c_str());
      Tick();
    });
  }

  ~ThreadPool() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    for (std::thread& thread : threads_) thread.join();
  }

  void Post(Task task) override {
    absl::MutexLock lock(&mu_);
    ready_.push_back(std::move(task));
  }

  void PostAt(absl::Time when, Task task) override {
    absl::MutexLock lock(&mu_);
    later_.push(Later{when, next_order_++, std::move(task)});
    ++timers_changed_;
  }

 private:
  struct Later {
    absl::Time when;
    uint64_t order;
    mutable Task task;  // priority_queue::top() is const
    bool operator<(const Later& other) const {
      return std::tie(when, order) > std::tie(other.when, other.order);
    }
  };

  void Work() {
    for (;;) {
      Task task;
      {
        absl::MutexLock lock(&mu_);
        mu_.Await(absl::Condition(this, &ThreadPool::HasWorkOrStops));
        if (ready_.empty()) return;
        task = std::move(ready_.front());
        ready_.pop_front();
      }
      std::move(task)();
    }
  }

  void Tick() {
    absl::MutexLock lock(&mu_);
    while (!stopping_) {
      const absl::Time now = Clock::Real().Now();
      while (!later_.empty() && later_.top().when <= now) {
        ready_.push_back(std::move(later_.top().task));
        later_.pop();
      }
      seen_timers_ = timers_changed_;
      const absl::Duration wait =
          later_.empty() ? absl::InfiniteDuration() : later_.top().when - now;
      mu_.AwaitWithTimeout(
          absl::Condition(this, &ThreadPool::TimersChangedOrStops), wait);
    }
  }

  bool HasWorkOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return !ready_.empty() || stopping_;
  }
  bool TimersChangedOrStops() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return timers_changed_ != seen_timers_ || stopping_;
  }

  absl::Mutex mu_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<Task> ready_ ABSL_GUARDED_BY(mu_);
  std::priority_queue<Later> later_ ABSL_GUARDED_BY(mu_);
  uint64_t next_order_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t timers_changed_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t seen_timers_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Executor> NewThreadPool(std::string name, size_t threads,
                                        int niceness) {
  return std::make_unique<ThreadPool>(name, threads, niceness);
}

}  // namespace larder
