#ifndef LARDER_TIERS_NVME_NVME_TIER_H_
#define LARDER_TIERS_NVME_NVME_TIER_H_

// The door of tiers/nvme: a durable tier in a log of large segment files
// (README.md, FORMAT.md).

#include <cstdint>
#include <memory>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/file_io.h"
#include "store/index.h"
#include "store/status.h"
#include "store/tier.h"
#include "store/units.h"

namespace larder {

struct NvmeOptions {
  // What the segment files may occupy. At least 8 segment files; extents can
  // have somewhat less (TierUsage::capacity_bytes), the rest is room for
  // garbage collection.
  uint64_t capacity_bytes = 0;
  // A multiple of kPageBytes, 512 KiB to 1 TiB. The largest extent is a
  // quarter of it.
  uint64_t segment_file_bytes = 1_GiB;
  // Pieces under way at a time, of all reads and writes together. 1..4096.
  uint32_t queue_depth = 128;
  // Larger transfers are split into pieces of this; a multiple of kPageBytes.
  uint64_t io_bytes = 1_MiB;

  // Group commit: written records are synced when nothing more is being
  // written, or this many bytes have gathered, or the first has waited so long.
  uint64_t sync_bytes = 64_MiB;
  absl::Duration sync_interval = absl::Milliseconds(5);
  // Frees are remembered at the next index write, at the latest after this.
  absl::Duration delete_interval = absl::Seconds(1);

  // Garbage collection starts when fewer segment files than this could still
  // be opened, and moves at most so many bytes a second (0 = no bound) in
  // steps of so many, unless a write waits for room.
  uint32_t gc_free_files = 2;
  uint64_t gc_bytes_per_second = 512_MiB;
  uint64_t gc_step_bytes = 4_MiB;
  // Of the capacity, beyond what progress needs: the more, the less is moved.
  double gc_reserve_fraction = 0.05;

  // After a failed write, sync or file creation, how long until the next try.
  absl::Duration retry_interval = absl::Seconds(1);

  Status Validate() const;
};

// What happened inside, for metrics and tests.
struct NvmeCounters {
  uint64_t stale_completions = 0;  // late or repeated: ignored
  uint64_t short_completions = 0;
  uint64_t io_retries = 0;
  uint64_t io_errors = 0;
  uint64_t failed_syncs = 0;
  uint64_t condemned_files = 0;
  uint64_t index_errors = 0;
  uint64_t corrupt_records = 0;  // found by garbage collection; dropped
  uint64_t gc_moved_records = 0;
  uint64_t deleted_files = 0;
  uint64_t segment_files = 0;  // now
  uint64_t syncs = 0;
};

// Destruction waits for I/O that is under way, and fails what is not done with
// Cancelled; a daemon on a disk that hangs exits without destroying it.
class NvmeTier : public DurableTier {
 public:
  virtual NvmeCounters Counters() const = 0;
};

// Recover must come first; until then every call fails with
// FailedPrecondition. `io` must have no other user. All outlive the tier; the
// executor runs at most two tasks of it at a time, which may block on `io` and
// `index`. InvalidArgument.
StatusOr<std::unique_ptr<NvmeTier>> NewNvmeTier(const NvmeOptions& options,
                                                FileIo& io, Index& index,
                                                Executor& executor,
                                                Clock& clock);

}  // namespace larder

#endif  // LARDER_TIERS_NVME_NVME_TIER_H_
