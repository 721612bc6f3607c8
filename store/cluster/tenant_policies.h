#ifndef LARDER_STORE_CLUSTER_TENANT_POLICIES_H_
#define LARDER_STORE_CLUSTER_TENANT_POLICIES_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"

#include "store/cluster/chunk_cipher.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_calls.h"
#include "store/status.h"
#include "store/types.h"

namespace larder {

// What an operator decided about a tenant's chunks.
struct TenantPolicy {
  TenantId tenant{};
  // Names of the nodes that may have them; empty: all of the cluster.
  std::vector<std::string> nodes{};
  // ChunkCipher::kKeyBytes bytes: they travel encrypted with it, between nodes
  // that have it. Empty: as they are.
  std::string key{};
};

// Who may have whose chunks, what tenants are called between nodes, and how
// nodes talk about those with a key. Thread-safe.
class TenantPolicies {
 public:
  // Of the node `self`. `secret`: at least 32 bytes that all nodes have and no
  // client; empty: the cluster's name stands for it.
  TenantPolicies(std::string_view cluster, NodeId self, std::string_view secret,
                 const std::vector<TenantPolicy>& policies);

  // Of the secret: nodes that say another do not understand each other. It
  // tells nothing of the secret.
  uint64_t secret_check() const { return secret_check_; }
  // Scope::tenant.
  uint64_t DirectoryKey(TenantId tenant) const;

  // Whether the node, which proved who it is, may have the tenant's chunks.
  bool Allows(TenantId tenant, NodeId node) const;
  bool AllowsSelf(TenantId tenant) const { return Allows(tenant, self_); }

  // What the tenant's chunks travel with; null: as they are.
  const ChunkCipher* CipherOf(TenantId tenant) const;
  // Makes of a question about the tenant's chunks what may go to node `to`, and
  // of what takes its answer; see SealQuestion. Does nothing without a key.
  Status Seal(TenantId tenant, NodeId to, std::string& message,
              PeerCalls::Replied& replied) const;
  // Whether a question of `from` that came sealed with that tenant's key, or
  // open, may be about `tenant`: of those with a key nothing is told in the
  // open.
  bool MayAsk(TenantId tenant, NodeId from,
              std::optional<TenantId> sealed) const;

 private:
  const NodeId self_;
  uint64_t secret_check_ = 0;
  uint64_t seed_ = 0;
  // Only tenants with nodes of their own.
  absl::flat_hash_map<TenantId, std::set<NodeId>> nodes_;
  // Only tenants with a key.
  absl::node_hash_map<TenantId, ChunkCipher> ciphers_;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_TENANT_POLICIES_H_
