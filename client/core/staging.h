#ifndef LARDER_CLIENT_CORE_STAGING_H_
#define LARDER_CLIENT_CORE_STAGING_H_

#include <cstdint>
#include <map>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/units.h"

namespace larder::client {

// Gives out pieces of a staging region, the lowest that fits: what was used
// last is used again, so that a saver stays in memory that is there already
// (and in the cache), however large the region may become. Bounded by the
// region; who finds no room backs off, or waits until his deadline.
//
// Thread-safe. Offsets are multiples of kPageBytes.
class StagingPool {
 public:
  explicit StagingPool(uint64_t bytes);
  StagingPool(const StagingPool&) = delete;
  StagingPool& operator=(const StagingPool&) = delete;

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
  const uint64_t capacity_;
  mutable absl::Mutex mu_;
  absl::CondVar freed_;
  // Bytes by offset. Neighbours are joined.
  std::map<uint64_t, uint64_t> gaps_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, uint64_t> live_ ABSL_GUARDED_BY(mu_);
  uint64_t frees_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_STAGING_H_
