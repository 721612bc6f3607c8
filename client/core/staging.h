#ifndef LARDER_CLIENT_CORE_STAGING_H_
#define LARDER_CLIENT_CORE_STAGING_H_

#include <cstdint>
#include <deque>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/units.h"

namespace larder::client {

// Gives out pieces of a staging region in ring order: pieces are about as old
// as each other, so freeing the oldest is what makes room. Bounded by the
// region; who finds no room backs off, or waits until his deadline.
//
// Thread-safe. Offsets are multiples of kPageBytes.
class StagingRing {
 public:
  explicit StagingRing(uint64_t bytes) : capacity_(bytes & ~(kPageBytes - 1)) {}
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  uint64_t capacity() const { return capacity_; }

  // nullopt: no room now (or never, if bytes > capacity()).
  std::optional<uint64_t> Allocate(uint64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);
  // Gives a piece back; `offset` as Allocate returned it.
  void Free(uint64_t offset) ABSL_LOCKS_EXCLUDED(mu_);
  // Until something was freed after `frees` frees, at most `longest`.
  void WaitForFree(uint64_t frees, absl::Duration longest)
      ABSL_LOCKS_EXCLUDED(mu_);
  uint64_t frees() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Piece {
    uint64_t offset = 0;
    uint64_t bytes = 0;
    bool is_free = false;
  };

  const uint64_t capacity_;
  mutable absl::Mutex mu_;
  absl::CondVar freed_;
  // Oldest first; offsets go up, and round once.
  std::deque<Piece> pieces_ ABSL_GUARDED_BY(mu_);
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t frees_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_STAGING_H_
