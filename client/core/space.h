#ifndef LARDER_CLIENT_CORE_SPACE_H_
#define LARDER_CLIENT_CORE_SPACE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "client/core/client.h"
#include "client/core/jobs.h"
#include "client/core/link.h"
#include "client/core/match_cache.h"
#include "store/hit_rules.h"
#include "store/space.h"
#include "store/status.h"
#include "store/types.h"

namespace larder::client {

// A space as this process opened it: calls about its chunks. Survives the
// daemon: what was opened is opened again on the next link.
//
// Thread-safe; shared by whatever is under way in it.
class Space : public SpaceWatcher, public std::enable_shared_from_this<Space> {
 public:
  // `value_unit` != 0: a space of values (values.h), in units of so many bytes.
  static StatusOr<std::shared_ptr<Space>> Open(Client& client,
                                               SpaceDescriptor descriptor,
                                               uint32_t value_unit,
                                               absl::Time deadline);

  Client& client() { return client_; }
  const SpaceDescriptor& descriptor() const { return descriptor_; }
  const SpaceId& id() const { return id_; }
  const std::string& encoding() const { return encoding_; }
  uint32_t value_unit() const { return value_unit_; }
  Epoch epoch() const { return epoch_; }

  // Where this space is now.
  struct At {
    std::shared_ptr<Link> link;
    uint32_t handle = 0;
  };
  StatusOr<At> Reach(absl::Time deadline);

  StatusOr<MatchAnswer> Match(const MatchQuery& query, absl::Time deadline);
  // nullptr: not known yet. Unavailable: there is no daemon now.
  StatusOr<std::shared_ptr<const MatchAnswer>> MatchCached(
      const MatchQuery& query);
  StatusOr<std::vector<ChunkState>> Lookup(std::span<const ChunkId> ids,
                                           absl::Time deadline);
  // One element per id; copies worse than `worst` are a miss. Unimplemented:
  // the daemon is too old to say.
  StatusOr<std::vector<StoredChunk>> Describe(std::span<const ChunkId> ids,
                                              Lineage worst,
                                              absl::Time deadline);
  // Waits until layers [0, layers) of the groups in each id's mask are here
  // (AwaitRequest), until the deadline, or cancelled; then how many layers of
  // each id are. Unimplemented: the daemon is too old.
  StatusOr<std::vector<uint32_t>> Await(std::span<const ChunkId> ids,
                                        std::span<const GroupMask> groups,
                                        uint32_t layers, absl::Time deadline,
                                        const Cancelled* cancelled);
  Status LookupCached(std::span<const ChunkId> ids,
                      std::span<std::optional<ChunkState>> states);
  Status Prefetch(std::span<const ChunkId> ids, absl::Time deadline);
  StatusOr<Epoch> AdvanceEpoch(absl::Time deadline);
  StatusOr<uint64_t> Delete(std::span<const ChunkId> ids, absl::Time deadline);

  struct Page {
    std::vector<wire::ListedChunk> chunks;
    bool more = false;
  };
  StatusOr<Page> List(const std::optional<ChunkId>& after, uint32_t limit,
                      absl::Time deadline);
  struct Why {
    MissReason reason = MissReason::kNone;
    std::string text;
  };
  StatusOr<Why> WhyMiss(const ChunkId& id, const Sha256Digest& root_content,
                        absl::Time deadline);

  // What this client itself just made visible or dropped.
  void OnLookupChanged() override;
  void OnEpoch(Epoch epoch) override;

 private:
  Space(Client& client, SpaceDescriptor descriptor, uint32_t value_unit);
  StatusOr<MatchAnswer> MatchOnce(const At& at, const MatchQuery& query,
                                  absl::Time deadline);
  void FetchWanted();

  Client& client_;
  const SpaceDescriptor descriptor_;
  const SpaceId id_;
  const std::string encoding_;
  const uint32_t value_unit_;
  std::atomic<Epoch> epoch_{Epoch{}};
  MatchCache cache_;
};

// READY or DURABLE ones in a row from the first.
uint32_t CountConsecutive(std::span<const ChunkState> states);

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_SPACE_H_
