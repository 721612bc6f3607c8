#ifndef LARDER_CLIENT_CORE_SAVER_H_
#define LARDER_CLIENT_CORE_SAVER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/device.h"
#include "client/core/link.h"
#include "client/core/queue.h"
#include "client/core/space.h"
#include "client/core/view.h"
#include "store/record.h"
#include "store/status.h"

namespace larder::client {

struct SaveRequest {
  GroupIndex group{};
  PartShape box;             // counts of 0 = all
  uint32_t token_count = 0;  // 0 = chunk_tokens
  std::optional<ChunkId> id;
  Lineage lineage = Lineage::kExact;
  bool wait = false;  // for room, until the deadline
  absl::Time deadline = absl::InfiniteFuture();
};

// What is in the chunk, for events (ChunkBlocks); sent if the daemon wants it.
// Points to memory that is the caller's, valid during the call.
struct BlockHints {
  std::span<const uint64_t> hashes;
  std::span<const uint32_t> tokens;
  bool signed_hashes = false;
  bool keyed = false;
};

struct CommitHints {
  std::optional<ChunkId> id;
  ChunkId parent;             // zero = not given
  Sha256Digest root_content;  // zero = not given
  uint32_t token_begin = 0;
  Lineage lineage = Lineage::kExact;
  bool want_durable = false;
  uint8_t priority = 0;
  uint32_t stop_reason = 0;
  BlockHints blocks;
  std::string destination;  // a node's name; empty: none
  // Completions: bit SaveStage set.
  uint8_t stages = 0;
  std::shared_ptr<Queue> queue;
  uint64_t user_data = 0;
};

// One part of one chunk on its way into the store: a record built in place in
// staging memory. Nothing of it is visible before Commit, and nothing at all is
// left if it is destroyed before (or its process dies).
//
// Not thread-safe up to Commit, but for different layers being filled at once;
// thread-safe from then on.
class Saver {
 public:
  // AlreadyExists: nothing need be saved. ResourceExhausted: no room now (in
  // staging, or the daemon's). DeadlineExceeded only with `wait`.
  static StatusOr<std::unique_ptr<Saver>> Begin(Space& space,
                                                const SaveRequest& request);
  // Begins several for about one round trip, but for their staging: call
  // TakeStaging before filling one. Keep what is reserved at once small: it
  // counts against the daemon's capacity.
  static std::vector<StatusOr<std::unique_ptr<Saver>>> Reserve(
      Space& space, std::span<const SaveRequest> requests, absl::Time deadline);
  Status TakeStaging(bool wait, absl::Time deadline);
  ~Saver();
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;

  const RecordLayout& layout() const { return layout_; }
  // K and V of one layer (index within the group) in staging, to be filled.
  StatusOr<MutableByteSpan> Segment(uint32_t layer);
  // Fills layers [layer_begin, layer_end) from where `view` says.
  Status Gather(const View& view, uint32_t layer_begin, uint32_t layer_end);
  // The same of planes in the memory of a device, by kernels on `stream`:
  // returns at once. What those kernels read must not change before they have
  // run. Commit, Truncate, Segment and the end of the saver wait for them.
  Status GatherOnDevice(const View& view, uint32_t layer_begin,
                        uint32_t layer_end, Device& device,
                        kernels::cuda::Stream stream);
  // Would these calls have to wait?
  bool Gathering() const;
  // Fills the one stripe of an opaque layer from pieces, zeroes what is left.
  Status FillOpaque(uint32_t layer, std::span<const ByteSpan> pieces);
  // Drops a suffix of tokens.
  Status Truncate(uint32_t token_count);

  Status Commit(const CommitHints& hints);
  // OK once the stage was reached; DeadlineExceeded; or what went wrong.
  Status Wait(SaveStage stage, absl::Time deadline);
  JobId job() const { return job_; }

 private:
  class Progress;

  Saver(Space& space, std::shared_ptr<Link> link, GroupIndex group,
        const PartShape& shape, uint32_t tokens, RecordLayout layout);
  // Nothing reserved yet.
  static StatusOr<std::unique_ptr<Saver>> Describe(Space& space,
                                                   const Space::At& at,
                                                   const SaveRequest& request,
                                                   wire::Reserve& body);
  MutableByteSpan Record();
  MutableByteSpan Stripe(const SegmentEntry& segment, uint32_t stripe);
  const SegmentEntry* Find(uint32_t layer) const;
  void SetChecksum(const SegmentEntry& segment, uint32_t stripe,
                   const Checksum& checksum);
  void ForgetChecksums(const SegmentEntry& segment);
  void Abort();
  Status WaitForDevice();
  // The view's slots where the device reaches them.
  StatusOr<kernels::cuda::DevicePtr> PlacesFor(const View& view,
                                               const View::TokenRange& range,
                                               Device& device);

  const std::shared_ptr<Space> space_;
  const std::shared_ptr<Link> link_;
  const GroupIndex group_;
  const PartShape shape_;
  const JobId job_;
  uint32_t tokens_;
  RecordLayout layout_;
  std::optional<ChunkId> id_;
  ReservationId reservation_{};
  std::shared_ptr<Staging> staging_;
  uint64_t offset_ = 0;  // of the record in staging
  // Of stripes that were filled by copying; the others are hashed at commit.
  std::vector<Checksum> checksums_;
  std::vector<uint8_t> has_checksum_;
  std::shared_ptr<Progress> progress_;  // from Commit on
  // Kernels under way: each event is behind all of its stream's.
  struct DeviceGather {
    Device* device = nullptr;
    kernels::cuda::Stream stream = nullptr;
    kernels::cuda::Event done = nullptr;
  };
  std::vector<DeviceGather> gathers_;
  // What they read besides: usually one list for all layers.
  struct DevicePlaces {
    Device* device = nullptr;
    std::vector<int64_t> slots;
    Device::Pinned memory;
  };
  std::vector<DevicePlaces> places_;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_SAVER_H_
