#ifndef LARDER_STORE_CLUSTER_PEER_SERVICE_H_
#define LARDER_STORE_CLUSTER_PEER_SERVICE_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/cluster/membership.h"
#include "store/cluster/peer_messages.h"
#include "store/cluster/tenant_policies.h"
#include "store/engine.h"
#include "store/lifeline.h"
#include "store/transport.h"
#include "store/units.h"

namespace larder {

struct PeerServiceOptions {
  // Of what was encrypted and waits, in memory of its own, to be sent. What has
  // no room waits, held, to be encrypted; one read alone may have more.
  uint64_t sealed_bytes_max = 32_MiB;
};

// Gives other nodes what this one has: says which records there are, and puts
// their bytes into the landings of who asks. What is being sent is held, and
// what lies in a slower tier is brought up first. Thread-safe; never blocks.
// Of a tenant whose chunks the asking node may not have (TenantPolicies), there
// is nothing. Who asks about a tenant with a key has to have it: the question
// is sealed with it, and so are the answer and what is put.
class PeerService {
 public:
  // Order of the end: the transport, by which nothing reads the engine's memory
  // any more; the engine, whose clients these are; the service.
  // `policies` outlive it.
  PeerService(Engine& engine, const TenantPolicies& policies,
              const PeerServiceOptions& options)
      : engine_(engine), policies_(policies), options_(options) {}
  ~PeerService();
  // Before the transport goes: what waits for its turn to be encrypted is
  // answered that nothing is there.
  void Stop();

  // Messages of kinds 16 to 31, of the node `from`; `sealed`: with whose key it
  // came. `deadline` as in LinkService::OnCall.
  void Handle(NodeId from, const std::shared_ptr<Link>& link,
              const std::string& message, std::optional<TenantId> sealed,
              absl::Time deadline, Answer answer);

  struct Stats {
    uint64_t reads = 0;
    uint64_t refused_reads = 0;  // the record was not there
    uint64_t sent_bytes = 0;
    uint64_t sealed_bytes = 0;  // of these, encrypted
  };
  Stats GetStats() const;

 private:
  struct Reading;
  struct Sealing {
    std::shared_ptr<Reading> reading;
    ByteSpan bytes;
  };

  void Read(const std::shared_ptr<Link>& link, const ReadQuery& query,
            absl::Time deadline, Answer answer);
  // The chunk is in memory, or never will be.
  void Send(const std::shared_ptr<Reading>& reading, MissReason reason);
  void End(const std::shared_ptr<Reading>& reading);
  // Encrypts what there is room for, and puts it.
  void SealNext();
  void SealAndPut(const Sealing& sealing);
  ClientId ClientOf(TenantId tenant);

  Engine& engine_;
  const TenantPolicies& policies_;
  const PeerServiceOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  // Holds are of these.
  std::map<TenantId, ClientId> clients_ ABSL_GUARDED_BY(mu_);
  std::deque<Sealing> sealing_ ABSL_GUARDED_BY(mu_);
  uint64_t sealed_bytes_ ABSL_GUARDED_BY(mu_) = 0;  // not sent yet
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_SERVICE_H_
