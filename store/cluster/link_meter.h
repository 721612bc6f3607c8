#ifndef LARDER_STORE_CLUSTER_LINK_METER_H_
#define LARDER_STORE_CLUSTER_LINK_METER_H_

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"

namespace larder {

// What the network to a node gives, by what goes over it anyway. Thread-safe.
class LinkMeter {
 public:
  // Of a minute, the least answer time in it stands for the round trip.
  static constexpr absl::Duration kWindow = absl::Seconds(30);
  // A rate is taken from no fewer bytes, and this often while there is much.
  static constexpr uint64_t kRateBytes = 256 << 10;
  static constexpr absl::Duration kRateEvery = absl::Milliseconds(100);

  explicit LinkMeter(Clock& clock) : clock_(clock) {}

  // A call was answered, so long after it was made.
  void Answered(absl::Duration after) ABSL_LOCKS_EXCLUDED(mu_);
  // Bytes are asked for; and came, or `bytes` of them did. In pairs; several
  // may be under way.
  void Begin() ABSL_LOCKS_EXCLUDED(mu_);
  void End(uint64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  struct Figures {
    absl::Duration round_trip;    // least lately; zero: not known
    double bytes_per_second = 0;  // received while something was; 0: not known
  };
  Figures Get() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  Clock& clock_;
  mutable absl::Mutex mu_;
  absl::Time window_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration least_ ABSL_GUARDED_BY(mu_) = absl::InfiniteDuration();
  absl::Duration before_ ABSL_GUARDED_BY(mu_) = absl::InfiniteDuration();
  uint32_t under_way_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time since_ ABSL_GUARDED_BY(mu_);
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  double rate_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_LINK_METER_H_
