#ifndef LARDER_STORE_CLUSTER_TENANT_POLICIES_H_
#define LARDER_STORE_CLUSTER_TENANT_POLICIES_H_

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/node_hash_map.h"

#include "store/cluster/chunk_cipher.h"
#include "store/cluster/membership.h"
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

// Who may have whose chunks, and what tenants are called between nodes.
// Thread-safe.
class TenantPolicies {
 public:
  // `secret`: at least 32 bytes that all nodes have and no client; empty: the
  // cluster's name stands for it.
  TenantPolicies(std::string_view cluster, std::string_view secret,
                 const std::vector<TenantPolicy>& policies);

  // Of the secret: nodes that say another do not understand each other. It
  // tells nothing of the secret.
  uint64_t secret_check() const { return secret_check_; }
  // Scope::tenant.
  uint64_t DirectoryKey(TenantId tenant) const;

  // Whether the node, which proved who it is, may have the tenant's chunks.
  bool Allows(TenantId tenant, NodeId node) const;

  // What the tenant's chunks travel with; null: as they are.
  const ChunkCipher* CipherOf(TenantId tenant) const;

 private:
  uint64_t secret_check_ = 0;
  uint64_t seed_ = 0;
  // Only tenants with nodes of their own.
  absl::flat_hash_map<TenantId, std::set<NodeId>> nodes_;
  // Only tenants with a key.
  absl::node_hash_map<TenantId, ChunkCipher> ciphers_;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_TENANT_POLICIES_H_
