#include "store/cluster/link_meter.h"

#include <algorithm>
#include <utility>

namespace larder {
namespace {

constexpr double kWeight = 0.25;  // of a new rate

}  // namespace

void LinkMeter::Answered(absl::Duration after) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = clock_.Now();
  if (now - window_ >= kWindow) {
    window_ = now;
    before_ = std::exchange(least_, absl::InfiniteDuration());
  }
  least_ = std::min(least_, after);
}

void LinkMeter::Begin() {
  absl::MutexLock lock(&mu_);
  if (under_way_++ > 0) return;
  since_ = clock_.Now();
  bytes_ = 0;
}

void LinkMeter::End(uint64_t bytes) {
  absl::MutexLock lock(&mu_);
  --under_way_;
  bytes_ += bytes;
  const absl::Time now = clock_.Now();
  const absl::Duration took = now - since_;
  if (bytes_ < kRateBytes || took <= absl::ZeroDuration() ||
      (under_way_ > 0 && took < kRateEvery)) {
    return;
  }
  const double rate = static_cast<double>(bytes_) / absl::ToDoubleSeconds(took);
  rate_ += (rate_ == 0 ? 1 : kWeight) * (rate - rate_);
  since_ = now;
  bytes_ = 0;
}

LinkMeter::Figures LinkMeter::Get() const {
  absl::MutexLock lock(&mu_);
  const absl::Duration least = std::min(least_, before_);
  return {least == absl::InfiniteDuration() ? absl::ZeroDuration() : least,
          rate_};
}

}  // namespace larder
