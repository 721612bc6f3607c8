#ifndef LARDER_CLIENT_ADAPTERS_NIXL_ABI_H_
#define LARDER_CLIENT_ADAPTERS_NIXL_ABI_H_

// What a NIXL agent and a plug-in of a storage backend hand each other: the
// memory layouts and the order of the virtual calls of NIXL's plug-in API 1, in
// Larder's words. NIXL's wheels carry no headers, so this is written down here
// and not included; the Itanium C++ ABI makes layouts and slots all that
// counts, names do not. Tested with the agents that README.md names: before
// another release is added there, tests/python/nixl must have passed with it.
//
// Nothing here may be reordered, and no member added.

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace larder::nixl {

inline constexpr int kPluginApi = 1;

enum Memory : uint32_t { kDram = 0, kVram, kBlock, kObject, kFile };
enum Operation : uint32_t { kRead = 0, kWrite = 1 };

enum Status : int32_t {
  kInProgress = 1,
  kSuccess = 0,
  kInvalidParameter = -2,
  kBackendError = -3,
  kNotFound = -4,
  kMismatch = -5,
  kRepostActive = -7,
  kNotSupported = -9,
  kCancelled = -11,
};

using Parameters = std::unordered_map<std::string, std::string>;

// A range: of memory, or of an object (then `address` is the offset in it).
struct Range {
  uintptr_t address;
  size_t bytes;
  uint64_t device;  // objects: the agent's number of the registration
};

// A range to be registered or asked for; an object's `info` is its key.
struct RegisteredRange : Range {
  std::string info;
};

// What a backend remembers of a registration; opaque to the agent.
class Registration {
 public:
  virtual ~Registration() = default;

 protected:
  bool is_private_ = true;
};

// A range to be moved, and what its registration made.
struct TransferRange : Range {
  Registration* registration;
};

// The agent makes these; plug-ins only read them.
template <class T>
struct RangeList {
  virtual ~RangeList() = default;

  Memory memory;
  std::vector<T> ranges;
};
using RegisteredRanges = RangeList<RegisteredRange>;
using TransferRanges = RangeList<TransferRange>;

// A transfer between prepare and release; opaque to the agent.
class Request {
 public:
  virtual ~Request() = default;
};

// What the agent knows when it makes a backend.
struct InitParameters {
  std::string agent;
  std::string backend;
  const Parameters* parameters;
  bool progress_thread;
  uint64_t progress_delay_us;
  uint32_t synchronization;
  bool telemetry;
};

// A backend. The agent reads the members from outside and calls the slots in
// this order; those named Unused belong to abilities that Supports* deny.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual bool SupportsRemote() const = 0;
  virtual bool SupportsLocal() const = 0;
  virtual bool SupportsNotifications() const = 0;
  virtual std::vector<Memory> SupportedMemories() const = 0;
  virtual Status Register(const RegisteredRange& range, const Memory& memory,
                          Registration*& out) = 0;
  virtual Status Deregister(Registration* registration) = 0;
  virtual Status Connect(const std::string& agent) = 0;
  virtual Status Disconnect(const std::string& agent) = 0;
  virtual Status Unload(Registration* registration) = 0;
  // `local` is memory, `remote` objects; range i goes with range i.
  virtual Status Prepare(const Operation& operation,
                         const TransferRanges& local,
                         const TransferRanges& remote, const std::string& agent,
                         Request*& request, const void* options) const = 0;
  virtual Status Post(const Operation& operation, const TransferRanges& local,
                      const TransferRanges& remote, const std::string& agent,
                      Request*& request, const void* options) const = 0;
  virtual Status Check(Request* request) const = 0;
  virtual Status Release(Request* request) const = 0;
  virtual Status UnusedRemoteView() const { return kNotSupported; }
  virtual Status UnusedLocalView() const { return kNotSupported; }
  virtual void UnusedReleaseView() const {}
  virtual Status UnusedPublicData() const { return kNotSupported; }
  virtual Status UnusedConnectionInfo() const { return kNotSupported; }
  virtual Status UnusedLoadConnectionInfo() { return kNotSupported; }
  virtual Status UnusedLoadRemote() { return kNotSupported; }
  virtual Status LoadLocal(Registration* in, Registration*& out) = 0;
  virtual Status UnusedNotifications() { return kNotSupported; }
  virtual Status UnusedNotify() const { return kNotSupported; }
  // One answer per range: nothing, or what is known about what is there.
  virtual Status Query(
      const RegisteredRanges& ranges,
      std::vector<std::optional<Parameters>>& answers) const = 0;
  virtual Status UnusedEstimate() const { return kNotSupported; }

  bool failed() const { return failed_; }

  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

 protected:
  explicit Backend(const InitParameters& init)
      : name_(init.backend),
        parameters_(*init.parameters),
        agent_(init.agent),
        telemetry_(init.telemetry) {}

  std::string name_;
  Parameters parameters_;  // shown to whoever asks the agent for them
  // The agent takes the events away; there are none, whatever their type.
  std::vector<char> telemetry_events_;
  std::mutex telemetry_mu_;
  bool failed_ = false;  // the agent gives up a backend that was made so
  const std::string agent_;
  const bool telemetry_;
};

static_assert(sizeof(Range) == 24 && sizeof(RegisteredRange) == 56 &&
              sizeof(TransferRange) == 32);
static_assert(offsetof(InitParameters, parameters) == 0x40 &&
              offsetof(InitParameters, telemetry) == 0x5c);
static_assert(sizeof(TransferRanges) == 40 && sizeof(Backend) == 0xd0);

// What nixl_plugin_init returns; must live as long as the plug-in.
struct Plugin {
  int api = kPluginApi;
  Backend* (*create)(const InitParameters*);
  void (*destroy)(Backend*);
  const char* (*name)();
  const char* (*version)();
  Parameters (*defaults)();
  std::vector<Memory> (*memories)();
};

}  // namespace larder::nixl

#endif  // LARDER_CLIENT_ADAPTERS_NIXL_ABI_H_
