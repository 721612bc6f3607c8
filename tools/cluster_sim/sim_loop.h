#ifndef LARDER_TOOLS_CLUSTER_SIM_SIM_LOOP_H_
#define LARDER_TOOLS_CLUSTER_SIM_SIM_LOOP_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"

namespace larder::cluster_sim {

// Time and work of a simulated cluster: a queue of tasks by time, on one
// thread. Not thread-safe.
class SimLoop final : public Clock, public Executor {
 public:
  ~SimLoop() override { Clear(); }

  absl::Time Now() const override { return now_; }
  absl::Time WallNow() const override { return now_; }
  void Post(Task task) override { PostAt(now_, std::move(task)); }
  void PostAt(absl::Time when, Task task) override {
    queue_.push_back({std::max(when, now_), next_++, std::move(task)});
    std::push_heap(queue_.begin(), queue_.end(), Later());
  }

  void RunUntil(absl::Time when) {
    while (!queue_.empty() && queue_.front().when <= when) {
      std::pop_heap(queue_.begin(), queue_.end(), Later());
      Entry entry = std::move(queue_.back());
      queue_.pop_back();
      now_ = entry.when;
      ++tasks_;
      std::move(entry.task)();
    }
    now_ = when;
  }
  void RunFor(absl::Duration time) { RunUntil(now_ + time); }
  uint64_t tasks() const { return tasks_; }
  void Clear() {
    // What is destroyed may post.
    while (!queue_.empty()) std::vector<Entry>().swap(queue_);
  }

 private:
  struct Entry {
    absl::Time when;
    uint64_t order = 0;
    Task task;
  };
  struct Later {
    bool operator()(const Entry& a, const Entry& b) const {
      return std::pair(a.when, a.order) > std::pair(b.when, b.order);
    }
  };

  absl::Time now_ = absl::FromUnixSeconds(1'000'000);
  std::vector<Entry> queue_;
  uint64_t next_ = 0;
  uint64_t tasks_ = 0;
};

}  // namespace larder::cluster_sim

#endif  // LARDER_TOOLS_CLUSTER_SIM_SIM_LOOP_H_
