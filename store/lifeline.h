#ifndef LARDER_STORE_LIFELINE_H_
#define LARDER_STORE_LIFELINE_H_

#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

namespace larder {

// Lets work that was handed to executors and tiers outlive its owner: it runs
// only while the owner lives, and the owner's destructor (Cut) waits for what
// is running, never for what is queued.
class Lifeline {
 public:
  // `work` with its arguments, or nothing if the owner is gone by then.
  template <class... Args>
  static absl::AnyInvocable<void(Args...) &&> Guard(
      std::shared_ptr<Lifeline> lifeline,
      absl::AnyInvocable<void(Args...) &&> work) {
    return [lifeline = std::move(lifeline),
            work = std::move(work)](Args... args) mutable {
      if (!lifeline->Enter()) return;
      std::move(work)(std::move(args)...);
      lifeline->Leave();
    };
  }

  void Cut() {
    absl::MutexLock lock(&mu_);
    cut_ = true;
    mu_.Await(absl::Condition(this, &Lifeline::NothingRuns));
  }

 private:
  bool Enter() {
    absl::MutexLock lock(&mu_);
    if (!cut_) ++running_;
    return !cut_;
  }
  void Leave() {
    absl::MutexLock lock(&mu_);
    --running_;
  }
  bool NothingRuns() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return running_ == 0;
  }

  absl::Mutex mu_;
  bool cut_ ABSL_GUARDED_BY(mu_) = false;
  int running_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_LIFELINE_H_
