// Without ZeroMQ routers are told nothing.

#include "tools/kv_events.h"

namespace larder {
namespace {

class NoKvEvents final : public KvEvents {
 public:
  bool Publishes(TenantId) const override { return false; }
  Stats stats() const override { return {}; }
};

}  // namespace

StatusOr<std::unique_ptr<KvEvents>> KvEvents::Start(const DaemonConfig& config,
                                                    TenantDirectory&, Engine&) {
  if (!config.kv_events.publish.empty()) {
    return absl::UnimplementedError(
        "kv_events.publish: this larderd was built without ZeroMQ "
        "(LARDER_CORE_ONLY)");
  }
  return std::unique_ptr<KvEvents>(std::make_unique<NoKvEvents>());
}

}  // namespace larder
