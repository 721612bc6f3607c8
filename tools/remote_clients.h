#ifndef LARDER_TOOLS_REMOTE_CLIENTS_H_
#define LARDER_TOOLS_REMOTE_CLIENTS_H_

#include <functional>
#include <memory>
#include <string>

#include "store/executor.h"
#include "store/status.h"
#include "tools/config.h"
#include "transport/local/session.h"
#include "transport/remote/remote_server.h"

namespace larder {

// Clients of other hosts, as the configuration says. Thread-safe.
class RemoteClients {
 public:
  // Listens. Errors say what to change. `hub`'s tenant_of decides whose chunks
  // a client sees. `executor` outlives it.
  static StatusOr<std::unique_ptr<RemoteClients>> Start(
      const DaemonConfig::RemoteClients& config,
      std::shared_ptr<SessionHub> hub, Executor& executor,
      std::function<void(const std::string& line)> log);
  virtual ~RemoteClients() = default;

  // Drops them all; nobody is served any more.
  virtual void Stop() = 0;
  virtual RemoteServer::Stats GetStats() const = 0;
};

}  // namespace larder

#endif  // LARDER_TOOLS_REMOTE_CLIENTS_H_
