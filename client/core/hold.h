#ifndef LARDER_CLIENT_CORE_HOLD_H_
#define LARDER_CLIENT_CORE_HOLD_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/time/time.h"

#include "client/core/link.h"
#include "client/core/space.h"
#include "store/record.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::client {

struct HoldOptions {
  absl::Time deadline = absl::InfiniteFuture();
  absl::Duration ttl = absl::ZeroDuration();  // zero = the daemon's default
  Lineage worst_lineage = Lineage::kExact;
  bool prefix_only = true;
  // Of what is coded in progressive planes only so many need be brought up, and
  // no more may be read (0: all). Such a hold cannot be shared.
  uint8_t planes = 0;
  // What must be brought up comes layer by layer, of all chunks together, and
  // WaitReady can wait for some of them (an older daemon brings it whole).
  bool by_layer = false;
  // Of each chunk the parts with these layers alone, also of one that is not
  // complete yet.
  uint16_t layer_begin = 0;
  uint16_t layer_end = 0;  // 0: all
};

// The right to read chunks, of this process or shared with others. Released by
// the destructor. Thread-safe.
class Hold {
 public:
  // Never NotFound: a hold of nothing has usable() == 0 and id() == 0.
  static StatusOr<std::shared_ptr<Hold>> Open(Space& space,
                                              std::span<const ChunkId> ids,
                                              const HoldOptions& options);
  // Aborted if there is no such hold (any more).
  static StatusOr<std::shared_ptr<Hold>> Attach(Space& space, HoldId id,
                                                std::span<const ChunkId> ids,
                                                absl::Time deadline);
  ~Hold();
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

  HoldId id() const { return id_; }
  Space& space() const { return *space_; }
  Link& link() const { return *link_; }
  const HeldChunks& chunks() const { return *chunks_; }
  size_t size() const { return ids_.size(); }
  const ChunkId& chunk_id(size_t index) const { return ids_[index]; }
  uint8_t planes() const { return planes_; }
  // Held, or on their way, in a row from the first.
  uint32_t usable() const;

  // OK, or Aborted: revoked, or the daemon is gone.
  Status Check() const;
  // Asks the daemon: OK if what was held was so until now, so that whatever was
  // read of it was what it should be. A hold that was revoked still is: its
  // memory stays as it is until the release.
  Status Confirm(absl::Time deadline) const;
  StatusOr<absl::Duration> Renew(absl::Duration ttl, absl::Time deadline);
  // Waits until chunk `index` is in memory, or its first `layers` layers are.
  // kNone, or why it will not be.
  MissReason WaitReady(size_t index, absl::Time deadline,
                       const Cancelled* cancelled, HeldChunks::Chunk& out,
                       uint32_t layers = UINT32_MAX);
  // What is read of chunk `index` is wrong.
  void ReportCorrupt(size_t index);

  // Keeps what a pointer that was handed out points into.
  void Keep(std::shared_ptr<const SlabMapping> mapping)
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  Hold(Space& space, std::shared_ptr<Link> link, uint32_t handle,
       std::span<const ChunkId> ids);
  Status Add(const Packet& reply, uint32_t first_index, bool& more);
  // The rest of an answer that did not fit one packet.
  Status Fetch(uint32_t first_index, absl::Time deadline);

  const std::shared_ptr<Space> space_;
  const std::shared_ptr<Link> link_;
  const uint32_t handle_;
  const std::vector<ChunkId> ids_;
  HoldId id_{};
  uint8_t planes_ = 0;
  std::shared_ptr<HeldChunks> chunks_;

  absl::Mutex mu_;
  std::vector<std::shared_ptr<const SlabMapping>> kept_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_HOLD_H_
