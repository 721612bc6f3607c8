#ifndef LARDER_STORE_RATE_LIMIT_H_
#define LARDER_STORE_RATE_LIMIT_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/time/time.h"

namespace larder {

// Bytes per second over time: steps that are repeated for ever. Empty: no
// limit.
struct RateSchedule {
  struct Step {
    uint64_t bytes_per_second = 0;  // 0: nothing moves
    absl::Duration time;            // > 0
    bool operator==(const Step&) const = default;
  };
  std::vector<Step> steps;
  bool operator==(const RateSchedule&) const = default;

  // Some step moves something, or there are none.
  bool Moves() const;
};

// When bytes that are asked for one after the other have come through a link of
// such a rate. The schedule begins with the first bytes, and anew with those
// that come after a second without any. Reads no clock; not thread-safe.
class RateLimit {
 public:
  // REQUIRES: schedule.Moves().
  explicit RateLimit(RateSchedule schedule) : schedule_(std::move(schedule)) {}

  // `now` if there is no limit.
  absl::Time Finish(uint64_t bytes, absl::Time now);

 private:
  static constexpr absl::Duration kPause = absl::Seconds(1);

  const RateSchedule schedule_;
  absl::Time free_ = absl::InfinitePast();  // when the link is idle again
  size_t step_ = 0;
  absl::Time step_end_;
};

}  // namespace larder

#endif  // LARDER_STORE_RATE_LIMIT_H_
