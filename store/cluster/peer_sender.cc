#include "store/cluster/peer_sender.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {

void PeerSender::SetView(std::shared_ptr<const ClusterView> view) {
  absl::MutexLock lock(&mu_);
  view_ = std::move(view);
}

void PeerSender::Send(const std::string& destination,
                      const SpaceDescriptor& space, const RecordMeta& meta,
                      Done done) {
  const NodeId node = ComputeNodeId(parts_.cluster, destination);
  bool known = false;
  {
    absl::MutexLock lock(&mu_);
    known = std::any_of(view_->nodes.begin(), view_->nodes.end(),
                        [node](const Node& other) { return other.id == node; });
  }
  if (node == parts_.self) return std::move(done)(absl::OkStatus());
  if (!known) {
    return std::move(done)(absl::NotFoundError(
        absl::StrCat("no node ", destination, " in the cluster")));
  }
  Offer(node, space, {meta}, Urgency::kDeadline,
        [done = std::move(done)](Status status) mutable {
          std::move(done)(absl::IsAlreadyExists(status) ? absl::OkStatus()
                                                        : std::move(status));
        });
}

void PeerSender::Offer(NodeId node, const SpaceDescriptor& space,
                       std::vector<RecordMeta> records, Urgency urgency,
                       Done done) {
  const TenantId tenant = records.front().tenant;
  if (!parts_.policies->Allows(tenant, node) ||
      !parts_.policies->AllowsSelf(tenant)) {
    return std::move(done)(absl::PermissionDeniedError(
        "cluster.tenants does not let the tenant's chunks go there"));
  }
  larder::Offer offer;
  offer.tenant = tenant;
  offer.urgency = urgency;
  offer.space = EncodeSpace(space);
  offer.records = std::move(records);
  {
    absl::MutexLock lock(&mu_);
    ++stats_.offers;
  }
  std::string message = Encode(offer);
  PeerCalls::Replied replied =
      [this, lifeline = lifeline_,
       done = std::move(done)](const StatusOr<std::string>& answer) mutable {
        Lifeline::Guard<>(lifeline, Task([this, &answer] {
                            if (answer.ok()) return;
                            absl::MutexLock lock(&mu_);
                            ++stats_.failed_offers;
                          }))();
        std::move(done)(answer.status());
      };
  const Status sealed = parts_.policies->Seal(tenant, node, message, replied);
  if (!sealed.ok()) return std::move(replied)(sealed);
  parts_.calls->Call(node, std::move(message), parts_.clock->Now() + timeout_,
                     std::move(replied));
}

PeerSender::Stats PeerSender::GetStats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace larder
