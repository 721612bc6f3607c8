#include "tools/control_plane.h"

#include <utility>

#include "codec/record_coder.h"
#include "tools/version.h"
#include "transport/admin/admin_server.h"

namespace larder {
namespace {

std::vector<AdminHooks::ConfigEntry> ConfigEntries(const DaemonConfig& config) {
  std::vector<AdminHooks::ConfigEntry> entries;
  const DaemonConfig defaults;
  for (const ConfigKey& key : ConfigSchema()) {
    entries.push_back({std::string(key.name), FormatConfigKey(config, key),
                       FormatConfigKey(defaults, key),
                       std::string(key.description), key.restart});
  }
  return entries;
}

AdminHooks MakeHooks(const ControlPlane::Dependencies& deps) {
  AdminHooks hooks;
  hooks.config = [config = deps.config] { return ConfigEntries(config()); };
  hooks.metrics = [input = deps.metrics] { return MetricsText(input()); };
  hooks.health = [ready = deps.ready] {
    std::vector<HealthCheck> checks;
    for (ReadyCheck& check : ready()) {
      checks.push_back({std::move(check.name), check.ok, check.required,
                        std::move(check.detail)});
    }
    return checks;
  };
  hooks.draining = deps.draining;
  TenantDirectory* const tenants = deps.tenants;
  hooks.tenant_name = [tenants](TenantId id) { return tenants->Name(id); };
  hooks.tenant_of_name = [tenants](std::string_view name) {
    return tenants->Find(name);
  };
  hooks.codec_name = [](CodecId id) {
    return FormatCoding(id, Lineage::kExact);
  };
  hooks.tenants = [tenants] { return tenants->Known(); };
  return hooks;
}

class FullControlPlane final : public ControlPlane {
 public:
  FullControlPlane(std::unique_ptr<AdminServer> admin,
                   std::unique_ptr<MetricsServer> metrics)
      : admin_(std::move(admin)), metrics_(std::move(metrics)) {}

  void Stop(absl::Duration grace) override {
    metrics_.reset();
    admin_->Stop(grace);
  }

 private:
  const std::unique_ptr<AdminServer> admin_;
  std::unique_ptr<MetricsServer> metrics_;
};

}  // namespace

StatusOr<std::unique_ptr<ControlPlane>> ControlPlane::Start(
    const DaemonConfig& config, Dependencies deps) {
  AdminServerOptions options;
  options.socket_path = config.admin.socket;
  options.socket_mode = static_cast<uint32_t>(config.admin.socket_mode);
  options.version = kVersion;
  options.engine_socket = config.server.socket;
  LARDER_ASSIGN_OR_RETURN(
      std::unique_ptr<AdminServer> admin,
      AdminServer::Start(std::move(options), MakeHooks(deps), *deps.engine));
  std::unique_ptr<MetricsServer> metrics;
  if (!config.metrics.listen.empty()) {
    LARDER_ASSIGN_OR_RETURN(metrics,
                            MetricsServer::Start(config.metrics.listen,
                                                 {deps.metrics, deps.ready}));
  }
  return std::unique_ptr<ControlPlane>(
      std::make_unique<FullControlPlane>(std::move(admin), std::move(metrics)));
}

}  // namespace larder
