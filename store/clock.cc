#include "store/clock.h"

#include <ctime>

#include "absl/time/clock.h"

namespace larder {
namespace {

class RealClock final : public Clock {
 public:
  absl::Time Now() const override {
    timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return absl::TimeFromTimespec(ts);
  }
  absl::Time WallNow() const override { return absl::Now(); }
};

}  // namespace

Clock& Clock::Real() {
  static auto* const kClock = new RealClock;
  return *kClock;
}

}  // namespace larder
