// Without gRPC and prometheus there is nothing for operators to talk to.

#include "tools/control_plane.h"

namespace larder {
namespace {

class NoControlPlane final : public ControlPlane {
 public:
  void Stop(absl::Duration) override {}
};

}  // namespace

StatusOr<std::unique_ptr<ControlPlane>> ControlPlane::Start(
    const DaemonConfig& config, Dependencies) {
  if (!config.metrics.listen.empty()) {
    return absl::UnimplementedError(
        "metrics.listen: this larderd was built without metrics "
        "(LARDER_CORE_ONLY)");
  }
  return std::unique_ptr<ControlPlane>(std::make_unique<NoControlPlane>());
}

}  // namespace larder
