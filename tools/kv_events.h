#ifndef LARDER_TOOLS_KV_EVENTS_H_
#define LARDER_TOOLS_KV_EVENTS_H_

#include <cstdint>
#include <memory>

#include "store/engine.h"
#include "store/status.h"
#include "store/types.h"
#include "tools/config.h"
#include "tools/tenants.h"

namespace larder {

// The publishers of KV events that the configuration asks for, one for each
// tenant. Thread-safe after Start.
class KvEvents {
 public:
  // Sums over all tenants (transport/kv_events/publisher.h says what of).
  struct Stats {
    uint64_t batches = 0, replayed = 0;
    uint64_t stored = 0, removed = 0;
    uint64_t listings = 0, outrun = 0;
    uint64_t untold_chunks = 0, refused = 0, subscriptions = 0;
  };

  // Without kv_events.publish nothing is published. Errors name the key.
  // `tenants` and `engine` outlive what is returned.
  static StatusOr<std::unique_ptr<KvEvents>> Start(const DaemonConfig& config,
                                                   TenantDirectory& tenants,
                                                   Engine& engine);
  virtual ~KvEvents() = default;

  virtual bool Publishes(TenantId tenant) const = 0;
  virtual Stats stats() const = 0;
};

}  // namespace larder

#endif  // LARDER_TOOLS_KV_EVENTS_H_
