#include "tools/remote_clients.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "transport/tls/tls_transport.h"
#ifdef LARDER_WITH_UCX
#include "transport/ucx/ucx_transport.h"
#endif

namespace larder {
namespace {

class WiredRemoteClients final : public RemoteClients {
 public:
  WiredRemoteClients(std::unique_ptr<RemoteServer> server,
                     std::unique_ptr<Transport> transport)
      : server_(std::move(server)), transport_(std::move(transport)) {}

  void Stop() override {
    std::unique_ptr<Transport> transport;
    absl::MutexLock lock(&mu_);
    transport.swap(transport_);
  }
  RemoteServer::Stats GetStats() const override { return server_->GetStats(); }

 private:
  const std::unique_ptr<RemoteServer> server_;
  absl::Mutex mu_;
  std::unique_ptr<Transport> transport_ ABSL_GUARDED_BY(mu_);  // goes first
};

StatusOr<std::unique_ptr<Transport>> MakeTransport(
    const DaemonConfig::RemoteClients& config,
    const std::function<void(const std::string&)>& log) {
  if (config.transport == "tls") {
    TlsOptions tls;
    tls.ca_file = config.ca;
    tls.certificate_file = config.certificate;
    tls.key_file = config.key;
    tls.connections_max = static_cast<uint32_t>(config.max_clients) + 1;
    tls.log = [log](const Status& status) {
      log(absl::StrCat("remote clients: ", status.message()));
    };
    return NewTlsTransport(tls);
  }
#ifdef LARDER_WITH_UCX
  UcxOptions ucx;
  ucx.accepted_max = static_cast<uint32_t>(config.max_clients);
  return NewUcxTransport(ucx);
#else
  return absl::UnimplementedError("this larderd was built without UCX");
#endif
}

}  // namespace

StatusOr<std::unique_ptr<RemoteClients>> RemoteClients::Start(
    const DaemonConfig::RemoteClients& config, std::shared_ptr<SessionHub> hub,
    Executor& executor, std::function<void(const std::string&)> log) {
  RemoteServer::Options options;
  options.max_clients = static_cast<uint32_t>(config.max_clients);
  options.staging_bytes = config.client_staging;
  options.all_staging_bytes = config.staging;
  options.log = log;
  std::unique_ptr<RemoteServer> server = RemoteServer::Create(
      std::move(hub), std::move(options), executor, Clock::Real());
  StatusOr<std::unique_ptr<Transport>> transport = MakeTransport(config, log);
  if (!transport.ok()) {
    return Annotate(transport.status(), "remote_clients.transport");
  }
  const StatusOr<std::string> address =
      (*transport)->Listen(config.listen, *server);
  if (!address.ok()) {
    return Annotate(address.status(), "remote_clients.listen");
  }
  log(absl::StrCat("remote clients: ", config.transport, "://", *address));
  return std::make_unique<WiredRemoteClients>(std::move(server),
                                              *std::move(transport));
}

}  // namespace larder
