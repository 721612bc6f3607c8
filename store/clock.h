#ifndef LARDER_STORE_CLOCK_H_
#define LARDER_STORE_CLOCK_H_

#include "absl/time/time.h"

namespace larder {

// Where every part of Larder gets its time from, so that tests own it.
// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;

  // Monotonic: never steps back, unrelated to the calendar. Only differences
  // between two values of one clock mean anything. Deadlines are such values;
  // absl::InfiniteFuture() is "none".
  virtual absl::Time Now() const = 0;

  // The calendar, for stamps that people read. May step. No decision hangs on
  // it.
  virtual absl::Time WallNow() const = 0;

  // The machine's clock (CLOCK_MONOTONIC, CLOCK_REALTIME). Lives for ever.
  static Clock& Real();
};

}  // namespace larder

#endif  // LARDER_STORE_CLOCK_H_
