#ifndef LARDER_TOOLS_CONTROL_PLANE_H_
#define LARDER_TOOLS_CONTROL_PLANE_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "store/engine.h"
#include "store/status.h"
#include "tools/cluster_member.h"
#include "tools/config.h"
#include "tools/durable_coding.h"
#include "tools/metrics.h"
#include "tools/profile_store.h"
#include "tools/tenants.h"

namespace larder {

// The operators' side of the daemon: admin socket and metrics port. Two
// implementations: control_plane.cc, and control_plane_none.cc where gRPC and
// prometheus are not wanted (LARDER_CORE_ONLY).
class ControlPlane {
 public:
  struct Dependencies {
    Engine* engine = nullptr;
    TenantDirectory* tenants = nullptr;
    ProfileStore* profiles = nullptr;
    DurableCoding* coding = nullptr;
    bool keeps_profiles = false;  // there is a tier whose copies are coded
    std::function<MetricsInput()> metrics;
    std::function<std::vector<ReadyCheck>()> ready;
    std::function<bool()> draining;
    std::function<DaemonConfig()> config;  // in force now
    ClusterMember* cluster = nullptr;      // may be null
  };

  // What is passed by pointer outlives the control plane.
  static StatusOr<std::unique_ptr<ControlPlane>> Start(
      const DaemonConfig& config, Dependencies dependencies);
  virtual ~ControlPlane() = default;

  // Ends what operators have under way, for at most `grace`. Idempotent.
  virtual void Stop(absl::Duration grace) = 0;
};

}  // namespace larder

#endif  // LARDER_TOOLS_CONTROL_PLANE_H_
