#ifndef LARDER_TESTS_TESTING_MANUAL_CLOCK_H_
#define LARDER_TESTS_TESTING_MANUAL_CLOCK_H_

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"

namespace larder {

// Time that stands still until a test moves it. Thread-safe.
class ManualClock final : public Clock {
 public:
  absl::Time Now() const override {
    absl::MutexLock lock(&mu_);
    return now_;
  }
  absl::Time WallNow() const override { return Now(); }

  void Advance(absl::Duration by) {
    absl::MutexLock lock(&mu_);
    now_ += by;
  }
  void AdvanceTo(absl::Time when) {
    absl::MutexLock lock(&mu_);
    if (when > now_) now_ = when;
  }

 private:
  mutable absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_) = absl::FromUnixSeconds(1'000'000);
};

}  // namespace larder

#endif  // LARDER_TESTS_TESTING_MANUAL_CLOCK_H_
