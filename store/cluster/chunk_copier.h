#ifndef LARDER_STORE_CLUSTER_CHUNK_COPIER_H_
#define LARDER_STORE_CLUSTER_CHUNK_COPIER_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "store/cluster/chunk_key.h"
#include "store/cluster/peer_sender.h"
#include "store/cluster/replication.h"
#include "store/engine.h"
#include "store/executor.h"
#include "store/lifeline.h"

namespace larder {

// Copies chunks of this node to others by offering them all records of one, in
// the background of what links carry. PermissionDenied where the tenant's
// policy does not let them go.
//
// Directories know chunks by 64-bit keys, of which nothing leads back to the
// chunk: what each is called is remembered here, 60 to 110 bytes per chunk.
// Thread-safe.
class ChunkCopier final : public Replicator {
 public:
  // `sender` and `executor` outlive it.
  ChunkCopier(PeerSender* sender, Executor* executor)
      : sender_(sender), executor_(executor) {}
  ~ChunkCopier() override { Stop(); }

  // This node has the chunk; has it not any more. May be called under the
  // engine's lock.
  void Stored(ChunkKey key, TenantId tenant, const SpaceId& space,
              const ChunkId& id) ABSL_LOCKS_EXCLUDED(mu_);
  void Removed(ChunkKey key) ABSL_LOCKS_EXCLUDED(mu_);

  // Copies from this engine from now on; none before, nor after Stop, after
  // which the engine is called no more, and copies are not answered.
  void Start(Engine& engine) ABSL_LOCKS_EXCLUDED(mu_);
  void Stop() { lifeline_->Cut(); }

  // NotFound, too: the chunk is not here any more.
  void Copy(ChunkKey chunk, NodeId to, Done done) override;
  // By the policy of the chunk's tenant.
  bool MayHave(ChunkKey chunk, NodeId node) const override
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Name {
    uint32_t scope = 0;  // in scopes_
    ChunkId id;
  };
  struct NamedScope {
    TenantId tenant{};
    SpaceId space;
    std::shared_ptr<const SpaceDescriptor> descriptor;  // once it was needed
  };
  struct Sending;

  void Begin(ChunkKey chunk, NodeId to, Done done) ABSL_LOCKS_EXCLUDED(mu_);
  std::shared_ptr<const SpaceDescriptor> DescriptorOf(Engine& engine,
                                                      uint32_t scope,
                                                      const NamedScope& named)
      ABSL_LOCKS_EXCLUDED(mu_);
  void SendNext(std::shared_ptr<Sending> sending);

  PeerSender* const sender_;
  Executor* const executor_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  Engine* engine_ ABSL_GUARDED_BY(mu_) = nullptr;
  absl::flat_hash_map<ChunkKey, Name> names_ ABSL_GUARDED_BY(mu_);
  // As many as there ever were spaces.
  std::vector<NamedScope> scopes_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::pair<TenantId, SpaceId>, uint32_t> scope_numbers_
      ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_CHUNK_COPIER_H_
