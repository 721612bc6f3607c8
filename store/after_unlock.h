#ifndef LARDER_STORE_AFTER_UNLOCK_H_
#define LARDER_STORE_AFTER_UNLOCK_H_

#include <utility>
#include <vector>

#include "store/executor.h"
#include "store/tier.h"

namespace larder {

// What a call decided under the engine's lock and does without it: gives
// extents back, then runs what was collected, in order. Declare it before the
// lock, so that it is destroyed after it.
class AfterUnlock {
 public:
  AfterUnlock() = default;
  AfterUnlock(const AfterUnlock&) = delete;
  AfterUnlock& operator=(const AfterUnlock&) = delete;
  ~AfterUnlock() {
    for (const auto& [tier, extent] : frees_) tier->Free(extent);
    for (Task& task : tasks_) std::move(task)();
  }

  void Free(Tier* tier, Extent extent) {
    if (extent) frees_.emplace_back(tier, extent);
  }
  void Call(Task task) { tasks_.push_back(std::move(task)); }

 private:
  std::vector<std::pair<Tier*, Extent>> frees_;
  std::vector<Task> tasks_;
};

}  // namespace larder

#endif  // LARDER_STORE_AFTER_UNLOCK_H_
