#ifndef LARDER_CLIENT_CORE_LINK_H_
#define LARDER_CLIENT_CORE_LINK_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/device.h"
#include "client/core/jobs.h"
#include "client/core/staging.h"
#include "store/engine.h"
#include "store/status.h"
#include "store/types.h"
#include "transport/local/channel.h"
#include "transport/wire.h"

namespace larder::client {

// What is known of the chunks of one hold. Filled by replies, then by
// completions, which may overtake them. Thread-safe.
class HeldChunks {
 public:
  struct Chunk {
    ChunkState state = ChunkState::kMiss;
    MissReason reason = MissReason::kNone;
    std::span<const wire::HeldPart> parts;  // as long as the HeldChunks live
    uint32_t layers = 0;  // kPending: that are there already, from the first on
  };

  // The chunks of a reply, in order, and the parts that they point into.
  void Append(std::span<const Chunk> chunks, std::vector<wire::HeldPart> parts)
      ABSL_LOCKS_EXCLUDED(mu_);
  // A completion of the hold: one of the three below.
  void Take(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);
  // Chunk `index` is ready (kNone) or will not come.
  void Settle(uint32_t index, MissReason reason) ABSL_LOCKS_EXCLUDED(mu_);
  // Of a pending chunk so many layers are there.
  void Land(uint32_t index, uint32_t layers) ABSL_LOCKS_EXCLUDED(mu_);
  void Revoke(MissReason reason) ABSL_LOCKS_EXCLUDED(mu_);

  size_t size() const ABSL_LOCKS_EXCLUDED(mu_);
  // kMiss beyond the end.
  Chunk Get(size_t index) const ABSL_LOCKS_EXCLUDED(mu_);
  bool AnyMissed(MissReason reason) const ABSL_LOCKS_EXCLUDED(mu_);
  // How many there are before the first that is a miss.
  uint32_t CountUsable() const ABSL_LOCKS_EXCLUDED(mu_);
  bool Pending(size_t index) const ABSL_LOCKS_EXCLUDED(mu_);
  // Pending, with fewer layers than that.
  bool Lacks(size_t index, uint32_t layers) const ABSL_LOCKS_EXCLUDED(mu_);
  // kNone while it is in force.
  MissReason revoked() const { return revoked_.load(); }

 private:
  mutable absl::Mutex mu_;
  std::vector<Chunk> chunks_ ABSL_GUARDED_BY(mu_);
  std::vector<std::vector<wire::HeldPart>> parts_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, MissReason> early_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint32_t, uint32_t> early_layers_ ABSL_GUARDED_BY(mu_);
  std::atomic<MissReason> revoked_{MissReason::kNone};
};

// Told about the stages of one commit; see Link::WatchSave.
class SaveWatcher {
 public:
  virtual ~SaveWatcher() = default;
  // An error is the last call. False: no more is wanted either.
  virtual bool OnStage(SaveStage stage, const Status& status) = 0;
};

// Told that what was cached about a space is old.
class SpaceWatcher {
 public:
  virtual ~SpaceWatcher() = default;
  virtual void OnLookupChanged() = 0;
  virtual void OnEpoch(Epoch epoch) = 0;
};

// Staging memory of one connection. Thread-safe.
struct Staging {
  explicit Staging(std::shared_ptr<StagingRegion> shared)
      : region(std::move(shared)), pool(region->bytes().size()) {}

  // Where the region begins for a device, which reaches it from then on.
  StatusOr<kernels::cuda::DevicePtr> AddressFor(Device& device)
      ABSL_LOCKS_EXCLUDED(mu);

  const std::shared_ptr<StagingRegion> region;
  StagingPool pool;
  absl::Mutex mu;
  absl::flat_hash_map<Device*, std::unique_ptr<Device::Registration>>
      registrations ABSL_GUARDED_BY(mu);
};

// One connection to one life of the daemon and all that is true only as long
// as it lasts: space handles, holds, saves under way, staging. When the daemon
// goes it breaks once and for all: everything under way fails at once, and the
// client makes a new one. Whoever uses it shares it, so that mappings outlive
// the connection.
//
// Thread-safe. Has one thread of its own, and only once a save completes into
// a queue (StartPump): all others drain the ring while they wait.
class Link {
 public:
  // To the daemon of this host, or of another where the path is a URL and
  // somebody is linked who knows what to do with it (remote.cc).
  static StatusOr<std::shared_ptr<Link>> Connect(
      const LocalChannel::Options& options);
  using Connector = StatusOr<std::shared_ptr<LocalChannel>> (*)(
      const LocalChannel::Options& options);
  // Before the first Connect.
  static void SetRemoteConnector(Connector connector);
  explicit Link(std::shared_ptr<LocalChannel> channel)
      : channel_(std::move(channel)) {}
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  LocalChannel& channel() { return *channel_; }
  bool broken() const { return channel_->broken(); }
  // Breaks it and fails what is under way.
  void Close();

  // Takes what the ring has; a few atomic loads if that is nothing.
  void Drain();
  // Waits until `done()`, draining. Cancelled when `cancelled` is set,
  // DeadlineExceeded, or Unavailable when the link breaks.
  Status Await(absl::FunctionRef<bool()> done, absl::Time deadline,
               const Cancelled* cancelled);
  // From now on a thread drains, so that watchers hear without anybody waiting.
  void StartPump() ABSL_LOCKS_EXCLUDED(mu_);

  // The handle of a space on this connection; opens it the first time.
  struct OpenedSpace {
    uint32_t handle = 0;
    Epoch epoch{};
  };
  StatusOr<OpenedSpace> Open(const SpaceId& id, const std::string& encoding,
                             const std::weak_ptr<SpaceWatcher>& watcher,
                             absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);

  // A hold of this connection, which several handles may share: completions go
  // to its chunks until the last Release, which tells the daemon with the next
  // message or flush.
  void WatchHold(HoldId hold, std::shared_ptr<HeldChunks> chunks)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Null if this connection does not have it.
  std::shared_ptr<HeldChunks> ShareHold(HoldId hold) ABSL_LOCKS_EXCLUDED(mu_);
  void ReleaseHold(HoldId hold) ABSL_LOCKS_EXCLUDED(mu_);
  void WatchSave(uint64_t request, std::shared_ptr<SaveWatcher> watcher)
      ABSL_LOCKS_EXCLUDED(mu_);
  void ForgetSave(uint64_t request) ABSL_LOCKS_EXCLUDED(mu_);

  // Shares `bytes` of staging the first time (or as much as the daemon allows).
  StatusOr<std::shared_ptr<Staging>> GetStaging(uint64_t bytes,
                                                absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Dispatch(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);
  void FailSaves() ABSL_LOCKS_EXCLUDED(mu_);

  const std::shared_ptr<LocalChannel> channel_;
  std::atomic<bool> stopping_{false};

  absl::Mutex mu_;
  struct HoldEntry {
    std::shared_ptr<HeldChunks> chunks;
    uint32_t handles = 1;
  };
  absl::flat_hash_map<HoldId, HoldEntry> holds_ ABSL_GUARDED_BY(mu_);
  // Completions of holds whose reply is not processed yet. Bounded.
  std::vector<wire::RingEntry> early_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, std::shared_ptr<SaveWatcher>> saves_
      ABSL_GUARDED_BY(mu_);
  struct SpaceEntry {
    OpenedSpace opened;
    std::vector<std::weak_ptr<SpaceWatcher>> watchers;
  };
  absl::flat_hash_map<SpaceId, SpaceEntry> spaces_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Staging> staging_ ABSL_GUARDED_BY(mu_);
  absl::Mutex staging_mu_ ABSL_ACQUIRED_BEFORE(mu_);  // one creates it
  std::thread pump_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_LINK_H_
