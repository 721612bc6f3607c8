#include "client/adapters/nixl/backend.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "client/adapters/nixl/object_store.h"
#include "client/adapters/nixl/options.h"
#include "client/adapters/nixl/plan.h"

#ifndef LARDER_NIXL_VERSION
#error "The build says which version of Larder this is"
#endif

namespace larder::nixl {
namespace {

// The agent's log is out of reach of plug-ins that do not link NIXL.
void Say(const std::string& what) {
  std::fprintf(stderr, "larder: nixl: %s\n", what.c_str());
}

// For what may go wrong with every transfer.
void Complain(const std::string& what) {
  using Clock = std::chrono::steady_clock;
  static std::atomic<Clock::rep> next_allowed{0};
  const Clock::duration now = Clock::now().time_since_epoch();
  Clock::rep next = next_allowed;
  if (now.count() < next ||
      !next_allowed.compare_exchange_strong(
          next, (now + std::chrono::seconds(1)).count())) {
    return;
  }
  Say(what);
}

// The agent knows no exceptions.
template <class Call>
Status NoThrow(Call&& call) {
  try {
    return call();
  } catch (const std::exception& e) {
    Complain(e.what());
  } catch (...) {
    Complain("an exception of unknown type");
  }
  return kBackendError;
}

Status ToStatus(const Outcome& outcome) {
  switch (outcome.code()) {
    case Code::kOk:
      return kSuccess;
    case Code::kInvalid:
      return kInvalidParameter;
    case Code::kUnsupported:
      return kNotSupported;
    default:
      return kBackendError;
  }
}

Status Refuse(const Outcome& why) {
  Complain(why.ToString());
  return ToStatus(why);
}

// Memory: there is nothing to pin.
class MemoryRegistration final : public Registration {};

class ObjectRegistration final : public Registration {
 public:
  ObjectRegistration(ObjectName object, uint64_t bytes)
      : object_(object), bytes_(bytes) {}
  const ObjectName& object() const { return object_; }
  uint64_t bytes() const { return bytes_; }

 private:
  const ObjectName object_;
  const uint64_t bytes_;
};

// As NIXL's own object backend: a registration without a key goes by number.
ObjectName ObjectOf(const RegisteredRange& range) {
  return NameOf(range.info.empty() ? std::to_string(range.device) : range.info);
}

class ObjectRequest final : public Request {
 public:
  ObjectRequest(Operation operation, Plan plan)
      : transfer(operation, std::move(plan)) {}

  Transfer transfer;
};

Result<std::vector<Portion>> PortionsOf(const TransferRanges& local,
                                        const TransferRanges& remote) {
  if (local.memory != kDram || remote.memory != kObject) {
    return Outcome(Code::kUnsupported,
                   "only transfers between host memory and objects");
  }
  if (local.ranges.size() != remote.ranges.size()) {
    return Outcome(Code::kInvalid, "lists of different lengths");
  }
  std::vector<Portion> portions;
  portions.reserve(local.ranges.size());
  for (size_t i = 0; i < local.ranges.size(); ++i) {
    const TransferRange& memory = local.ranges[i];
    const TransferRange& object = remote.ranges[i];
    const auto* registered =
        dynamic_cast<const ObjectRegistration*>(object.registration);
    if (registered == nullptr) {
      return Outcome(Code::kInvalid, "an object that is not registered");
    }
    if (memory.bytes != object.bytes) {
      return Outcome(Code::kInvalid, "ranges of different lengths");
    }
    portions.push_back({registered->object(), registered->bytes(),
                        object.address, reinterpret_cast<void*>(memory.address),
                        object.bytes});
  }
  return portions;
}

class LarderBackend final : public Backend {
 public:
  explicit LarderBackend(const InitParameters& init) : Backend(init) {
    // Programs log what the agent says the parameters are.
    parameters_.erase("token");
    failed_ = NoThrow([&] { return Open(*init.parameters); }) != kSuccess;
  }

  bool SupportsRemote() const override { return false; }
  bool SupportsLocal() const override { return true; }
  bool SupportsNotifications() const override { return false; }
  std::vector<Memory> SupportedMemories() const override {
    return {kDram, kObject};
  }

  Status Register(const RegisteredRange& range, const Memory& memory,
                  Registration*& out) override {
    return NoThrow([&] {
      if (memory == kDram) {
        out = new MemoryRegistration;
      } else if (memory == kObject) {
        // An object is registered by its extent; one that does not start at 0
        // says nothing of where the object ends.
        out = new ObjectRegistration(ObjectOf(range),
                                     range.address == 0 ? range.bytes : 0);
      } else {
        return kNotSupported;
      }
      return kSuccess;
    });
  }
  Status Deregister(Registration* registration) override {
    delete registration;
    return kSuccess;
  }

  // The agent connects to itself: transfers are local.
  Status Connect(const std::string& agent) override { return kSuccess; }
  Status Disconnect(const std::string& agent) override { return kSuccess; }
  // The registration itself serves as what is loaded.
  Status LoadLocal(Registration* in, Registration*& out) override {
    out = in;
    return kSuccess;
  }
  Status Unload(Registration* registration) override { return kSuccess; }

  Status Prepare(const Operation& operation, const TransferRanges& local,
                 const TransferRanges& remote, const std::string& agent,
                 Request*& request, const void* options) const override {
    return NoThrow([&] {
      const auto portions = PortionsOf(local, remote);
      if (!portions.ok()) return Refuse(portions.status());
      const auto plan_for = operation == kWrite ? PlanWrite : PlanRead;
      auto plan = plan_for(*portions, store_->options().value_bytes_max);
      if (!plan.ok()) return Refuse(plan.status());
      request = new ObjectRequest(operation, *std::move(plan));
      return kSuccess;
    });
  }

  // What is moved was said to Prepare.
  Status Post(const Operation& operation, const TransferRanges& local,
              const TransferRanges& remote, const std::string& agent,
              Request*& request, const void* options) const override {
    return NoThrow([&] {
      const Outcome connected = store_->Connect();
      if (!connected.ok()) return Refuse(connected);
      return Explain(store_->Start(TransferOf(request)));
    });
  }
  Status Check(Request* request) const override {
    return NoThrow([&] { return Explain(store_->Check(TransferOf(request))); });
  }
  Status Release(Request* request) const override {
    const Status stopped = NoThrow([&] {
      store_->Stop(TransferOf(request));
      return kSuccess;
    });
    if (stopped == kSuccess) delete request;
    return stopped;
  }

  Status Query(const RegisteredRanges& ranges,
               std::vector<std::optional<Parameters>>& answers) const override {
    return NoThrow([&] {
      if (ranges.memory != kObject) return kNotSupported;
      std::vector<ObjectName> objects;
      objects.reserve(ranges.ranges.size());
      for (const RegisteredRange& range : ranges.ranges) {
        objects.push_back(ObjectOf(range));
      }
      const auto found = store_->Find(objects);
      if (!found.ok()) return Refuse(found.status());
      answers.clear();
      for (const bool there : *found) {
        answers.push_back(there ? std::optional(Parameters()) : std::nullopt);
      }
      return kSuccess;
    });
  }

 private:
  static Transfer& TransferOf(Request* request) {
    return static_cast<ObjectRequest*>(request)->transfer;
  }

  // A miss is nothing to talk about.
  static Status Explain(Status status) {
    if (status == kBackendError) {
      Complain(
          "a transfer failed: the daemon went away, was full, or took "
          "longer than deadline_ms");
    } else if (status == kMismatch) {
      Complain(
          "an object is shorter than what was read of it, or longer than "
          "it was registered");
    }
    return status;
  }

  Status Open(const Parameters& parameters) {
    const auto options = ParseOptions(parameters);
    if (!options.ok()) {
      Say(options.status().ToString());
      return kInvalidParameter;
    }
    store_ = std::make_unique<ObjectStore>(*options);
    const Outcome connected = store_->Connect();
    switch (connected.code()) {
      case Code::kOk:
        return kSuccess;
      // Whoever starts first: the daemon may still come.
      case Code::kUnavailable:
      case Code::kDeadline:
        Say(connected.ToString() + "; goes on without the daemon");
        return kSuccess;
      default:
        Say(connected.ToString());
        return ToStatus(connected);
    }
  }

  std::unique_ptr<ObjectStore> store_;
};

Backend* Create(const InitParameters* init) {
  try {
    return new LarderBackend(*init);
  } catch (const std::exception& e) {
    Complain(e.what());
    return nullptr;
  }
}

}  // namespace

Plugin* GetPlugin() {
  static Plugin plugin{
      .create = Create,
      .destroy = [](Backend* backend) { delete backend; },
      .name = [] { return "LARDER"; },
      .version = [] { return LARDER_NIXL_VERSION; },
      .defaults = DefaultParameters,
      .memories =
          [] {
            return std::vector<Memory>{kDram, kObject};
          },
  };
  return &plugin;
}

}  // namespace larder::nixl
