#ifndef LARDER_STORE_CLUSTER_CLUSTER_TIER_H_
#define LARDER_STORE_CLUSTER_CLUSTER_TIER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/cluster/chunk_key.h"
#include "store/cluster/locator.h"
#include "store/cluster/peer_links.h"
#include "store/cluster/tenant_policies.h"
#include "store/executor.h"
#include "store/lifeline.h"
#include "store/tier.h"

namespace larder {

struct ClusterTierOptions {
  // What a node said that it has is believed for so long.
  absl::Duration known_for = absl::Seconds(10);
  // Records that something is remembered of. The older half goes first.
  size_t records_max = 100'000;
  // A read, and a question about records, that did not end by then failed.
  absl::Duration read_timeout = absl::Seconds(10);
  absl::Duration call_timeout = absl::Seconds(1);
};

// What the other nodes of the cluster have, as a tier of this one's engine.
// Locate asks directories who has chunks (Locator), then a holder of each which
// records it has: with those in mind the engine can make room and verify. A
// read opens a landing over the engine's memory and has the holder put the
// bytes there (PeerService). Thread-safe.
class ClusterTier final : public PeerTier {
 public:
  struct Parts {
    Locator* locator = nullptr;
    PeerLinks* links = nullptr;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
    const TenantPolicies* policies = nullptr;
  };

  ClusterTier(Parts parts, const ClusterTierOptions& options);
  // Ends reads: each is `done` before this returns, or its link has it still
  // and the transport must be destroyed first.
  ~ClusterTier() override;

  TierKind kind() const override { return TierKind::kPeer; }
  TierUsage Usage() const override { return {}; }
  uint64_t MaxExtentBytes() const override { return 0; }
  StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) override;
  void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
             Done done) override;
  void Free(Extent extent) override;
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override;
  void Find(TenantId tenant, const SpaceId& space, Epoch epoch,
            std::span<const ChunkId> ids, std::span<Chunk> out) override;
  std::vector<Part> Take(TenantId tenant, const SpaceId& space, Epoch epoch,
                         const ChunkId& chunk) override;
  void Locate(TenantId tenant, const SpaceId& space, Epoch epoch,
              std::vector<ChunkId> ids, uint32_t start, absl::Time deadline,
              Task done) override;

  struct Stats {
    uint64_t locates = 0;
    uint64_t record_questions = 0;  // to holders
    uint64_t reads = 0;
    uint64_t failed_reads = 0;
    uint64_t read_bytes = 0;
    uint64_t remembered_records = 0;
  };
  Stats GetStats() const;

 private:
  // A chunk as one node has it.
  struct Known {
    NodeId node{};
    ChunkKey key{};
    absl::Time until;
    Epoch epoch{};
    Chunk chunk;
    std::vector<RecordMeta> parts;
  };
  struct Key {
    TenantId tenant{};
    SpaceId space;
    ChunkId chunk;
    bool operator==(const Key&) const = default;
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.tenant, key.space, key.chunk);
    }
  };
  struct Taken {
    NodeId node{};
    ChunkKey key{};
    RecordMeta meta;
  };
  struct Locating;
  struct Reading;

  Scope ScopeOf(TenantId tenant, const SpaceId& space) const {
    return {parts_.policies->DirectoryKey(tenant), space};
  }
  const Known* Look(const Key& key, Epoch epoch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remember(const Key& key, Known known) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ForgetChunk(const Taken& taken);

  void OnLocated(const std::shared_ptr<Locating>& locating,
                 const std::vector<Location>& locations);
  void AskRecords(const std::shared_ptr<Locating>& locating, NodeId node,
                  std::vector<uint32_t> places);
  void OnRecords(const std::shared_ptr<Locating>& locating, NodeId node,
                 const std::vector<uint32_t>& places,
                 const StatusOr<std::string>& answer);

  void Begin(const std::shared_ptr<Reading>& reading,
             StatusOr<std::shared_ptr<Link>> link);
  // The memory was let go of.
  void End(const std::shared_ptr<Reading>& reading, Status status);

  const Parts parts_;
  const ClusterTierOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  // New answers go to the first; when it has half of records_max it becomes the
  // second, whose contents go.
  absl::flat_hash_map<Key, Known> young_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<Key, Known> old_ ABSL_GUARDED_BY(mu_);
  size_t young_records_ ABSL_GUARDED_BY(mu_) = 0;
  size_t old_records_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<uint64_t, Taken> taken_ ABSL_GUARDED_BY(mu_);
  uint64_t last_handle_ ABSL_GUARDED_BY(mu_) = 0;
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_CLUSTER_TIER_H_
