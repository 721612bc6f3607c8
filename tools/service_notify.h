#ifndef LARDER_TOOLS_SERVICE_NOTIFY_H_
#define LARDER_TOOLS_SERVICE_NOTIFY_H_

#include <optional>
#include <string>

#include "absl/time/time.h"

namespace larder {

// Talks to the service manager (sd_notify(3)): one datagram per message to the
// socket that it named. Without one, nothing happens. Thread-safe.
class ServiceNotify {
 public:
  // `socket`: the value of NOTIFY_SOCKET; empty: no service manager.
  explicit ServiceNotify(std::string socket) : socket_(std::move(socket)) {}

  // "READY=1", "STOPPING=1", "WATCHDOG=1", "STATUS=text" ...
  void Send(const std::string& message) const;

 private:
  const std::string socket_;
};

// How often to send WATCHDOG=1, from the values of WATCHDOG_USEC and
// WATCHDOG_PID (may be null): half of what was asked for.
std::optional<absl::Duration> WatchdogPeriod(const char* usec, const char* pid);

}  // namespace larder

#endif  // LARDER_TOOLS_SERVICE_NOTIFY_H_
