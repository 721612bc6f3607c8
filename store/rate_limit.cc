#include "store/rate_limit.h"

#include <algorithm>

namespace larder {

bool RateSchedule::Moves() const {
  return steps.empty() ||
         std::any_of(steps.begin(), steps.end(), [](const Step& step) {
           return step.bytes_per_second > 0;
         });
}

absl::Time RateLimit::Finish(uint64_t bytes, absl::Time now) {
  const std::vector<RateSchedule::Step>& steps = schedule_.steps;
  if (steps.empty()) return now;
  if (free_ == absl::InfinitePast() || now >= free_ + kPause) {
    step_ = 0;
    step_end_ = now + steps[0].time;
  }
  absl::Time at = std::max(now, free_);
  auto left = static_cast<double>(bytes);
  for (;;) {
    const RateSchedule::Step& step = steps[step_];
    if (at < step_end_) {
      const auto rate = static_cast<double>(step.bytes_per_second);
      const double room = rate * absl::ToDoubleSeconds(step_end_ - at);
      if (left <= room) {
        if (rate > 0) at += absl::Seconds(left / rate);
        break;
      }
      left -= room;
      at = step_end_;
    }
    step_ = (step_ + 1) % steps.size();
    step_end_ += steps[step_].time;
  }
  free_ = at;
  return at;
}

}  // namespace larder
