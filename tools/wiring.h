#ifndef LARDER_TOOLS_WIRING_H_
#define LARDER_TOOLS_WIRING_H_

#include <memory>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/status.h"
#include "tools/config.h"

namespace larder {

// A whole larderd in one object: the composition root, the only code that sees
// every concrete class. Thread-safe after Start.
class Daemon {
 public:
  // Builds everything from the inside out: executors, durable tier, DRAM,
  // engine (which recovers), operators' sockets, and the engines' socket last,
  // so that who can connect is served. Blocks for as long as recovery and
  // prefaulting take; progress goes to the log. Errors say what to change.
  static StatusOr<std::unique_ptr<Daemon>> Start(const DaemonConfig& config);

  // In the reverse order. Waits for I/O under way: on a disk that hangs, for
  // ever; main bounds that.
  virtual ~Daemon() = default;

  // Proves that the engine's lock is free and its threads answer.
  virtual void CheckAlive() = 0;

  // Accepts no more clients, drops those there are, and makes what was
  // committed durable, then calls `done` once from any thread.
  virtual void BeginShutdown(absl::AnyInvocable<void(Status) &&> done) = 0;

  // Bytes that are committed and not yet durable.
  virtual uint64_t DurableBacklog() const = 0;

  // After a reload: the configuration in force. If it cannot be (a rule names a
  // profile that is not to be had) nothing changes.
  virtual Status SetConfig(const DaemonConfig& config) = 0;
};

}  // namespace larder

#endif  // LARDER_TOOLS_WIRING_H_
