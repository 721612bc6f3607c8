#include "store/cluster/tenant_policies.h"

#include <cstring>
#include <span>

#include "store/cluster/key_derivation.h"
#include "store/cluster/sealed_question.h"
#include "store/fingerprint.h"

namespace larder {
namespace {

uint64_t Derive64(std::string_view secret, std::string_view cluster,
                  std::string_view what) {
  const DerivedKey key = DeriveKey(secret, cluster, what);
  uint64_t number;
  std::memcpy(&number, key.data(), sizeof number);
  return number;
}

}  // namespace

TenantPolicies::TenantPolicies(std::string_view cluster, NodeId self,
                               std::string_view secret,
                               const std::vector<TenantPolicy>& policies)
    : self_(self) {
  if (secret.empty()) {
    seed_ = Fingerprint64(std::as_bytes(std::span(cluster)));
  } else {
    seed_ = Derive64(secret, cluster, "larder tenants");
    secret_check_ = Derive64(secret, cluster, "larder greeting");
  }
  for (const TenantPolicy& policy : policies) {
    for (const std::string& node : policy.nodes) {
      nodes_[policy.tenant].insert(ComputeNodeId(cluster, node));
    }
    if (!policy.key.empty()) ciphers_.try_emplace(policy.tenant, policy.key);
  }
}

uint64_t TenantPolicies::DirectoryKey(TenantId tenant) const {
  const uint32_t number = Raw(tenant);
  return Fingerprint64(std::as_bytes(std::span(&number, 1)), seed_);
}

bool TenantPolicies::Allows(TenantId tenant, NodeId node) const {
  const auto it = nodes_.find(tenant);
  return it == nodes_.end() || it->second.contains(node);
}

const ChunkCipher* TenantPolicies::CipherOf(TenantId tenant) const {
  const auto it = ciphers_.find(tenant);
  return it == ciphers_.end() ? nullptr : &it->second;
}

Status TenantPolicies::Seal(TenantId tenant, NodeId to, std::string& message,
                            PeerCalls::Replied& replied) const {
  const ChunkCipher* const cipher = CipherOf(tenant);
  if (cipher == nullptr) return absl::OkStatus();
  return SealQuestion(*cipher, tenant, self_, to, message, replied);
}

bool TenantPolicies::MayAsk(TenantId tenant, NodeId from,
                            std::optional<TenantId> sealed) const {
  if (!Allows(tenant, from) || !AllowsSelf(tenant)) return false;
  return CipherOf(tenant) == nullptr ? !sealed.has_value() : sealed == tenant;
}

}  // namespace larder
