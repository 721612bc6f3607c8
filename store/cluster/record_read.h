#ifndef LARDER_STORE_CLUSTER_RECORD_READ_H_
#define LARDER_STORE_CLUSTER_RECORD_READ_H_

#include <memory>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/cluster/link_meter.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_messages.h"
#include "store/cluster/tenant_policies.h"
#include "store/executor.h"
#include "store/status.h"
#include "store/transport.h"
#include "store/units.h"

namespace larder {

// Bytes of a record of `node`, at the other end of `link`: opens a landing over
// `into` and has that node put them there (PeerService). `query` is all but
// landing and bytes, which are of `into`. What comes of a tenant with a key is
// decrypted there, once nobody can write to it any more. `done` once, by
// `deadline` and what it takes the link to close a landing, never from within
// the call: OK, all are there, not verified; else why they are not, DataLoss if
// they were not what that node encrypted. Nothing touches `into` any more.
// `meter` is told of the bytes.
// Whatever becomes of the caller, `into` must last until then; `policies`
// longer than the link.
void ReadRecord(const std::shared_ptr<Link>& link, NodeId node,
                const TenantPolicies& policies, ReadQuery query,
                MutableByteSpan into, absl::Time deadline, Executor& executor,
                std::shared_ptr<LinkMeter> meter,
                absl::AnyInvocable<void(Status) &&> done);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_RECORD_READ_H_
