// The stand-in's functions of the CUDA driver API: their checks and rules; what
// they do is in memory.h and schedule.h.

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/driver_types.h"
#include "tests/kernels/simt/simt.h"
#include "tests/standin/memory.h"
#include "tests/standin/schedule.h"
#include "tests/standin/standin.h"

// The objects that handles point to.
namespace larder::kernels::cuda {
struct ContextObject {
  int references = 0;
};
struct StreamObject {
  std::shared_ptr<standin::StreamState> state;
};
struct EventObject {
  std::shared_ptr<standin::EventState> state;
};
struct ModuleObject {
  std::map<std::string, FunctionObject*> functions;
};
struct FunctionObject {
  StandinKernel kernel = nullptr;          // the test's own, or
  const simt::Kernel* compiled = nullptr;  // one of kernels/cuda
  int dynamic_shared_bytes_max = 48 << 10;
};
struct GraphObject {
  standin::GraphState state;
};
struct GraphExecObject {
  standin::GraphExecState state;
};
}  // namespace larder::kernels::cuda

namespace larder::standin {
namespace {

using namespace kernels::cuda;  // NOLINT: the API's own words

constexpr int kSharedOptinBytes = 227 << 10;
constexpr uint64_t kIpcMagic = 0x6c61726465726970;  // "larderip"

// Fat binaries: the wrapper that nvcc's host code has, and what it points to.
constexpr uint32_t kFatbinWrapperMagic = 0x466243b1;
constexpr uint32_t kFatbinMagic = 0xba55ed50;
constexpr uint32_t kElfMagic = 0x464c457f;

#define STANDIN_API extern "C" __attribute__((visibility("default")))

struct Named {
  Result code;
  const char* name;
  const char* text;
};
constexpr Named kErrors[] = {
    {Result::kSuccess, "CUDA_SUCCESS", "no error"},
    {Result::kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {Result::kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {Result::kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED",
     "initialization error"},
    {Result::kNoDevice, "CUDA_ERROR_NO_DEVICE",
     "no CUDA-capable device is detected"},
    {Result::kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE",
     "invalid device ordinal"},
    {Result::kInvalidImage, "CUDA_ERROR_INVALID_IMAGE",
     "device kernel image is invalid"},
    {Result::kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT",
     "invalid device context"},
    {Result::kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {Result::kEccUncorrectable, "CUDA_ERROR_ECC_UNCORRECTABLE",
     "uncorrectable ECC error encountered"},
    {Result::kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE",
     "invalid resource handle"},
    {Result::kIllegalState, "CUDA_ERROR_ILLEGAL_STATE",
     "the operation cannot be performed in the present state"},
    {Result::kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {Result::kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {Result::kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {Result::kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {Result::kHostMemoryAlreadyRegistered,
     "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
     "part or all of the requested memory range is already mapped"},
    {Result::kHostMemoryNotRegistered, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
     "pointer does not correspond to a registered memory region"},
    {Result::kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED",
     "unspecified launch failure"},
    {Result::kNotPermitted, "CUDA_ERROR_NOT_PERMITTED",
     "operation not permitted"},
    {Result::kNotSupported, "CUDA_ERROR_NOT_SUPPORTED",
     "operation not supported"},
    {Result::kStreamCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {Result::kStreamCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {Result::kStreamCaptureUnmatched, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "capture was not initiated in this stream"},
    {Result::kStreamCaptureUnjoined, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
     "capturing stream has unjoined work"},
    {Result::kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
    {Result::kUnknown, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What an IPC handle holds, for memory and for events.
struct IpcContents {
  uint64_t magic;
  int32_t pid;
  int32_t fd;
  uint64_t bytes;
  uint32_t is_event;
};
static_assert(sizeof(IpcContents) <= sizeof(IpcMemHandle));

// Opens what another process's handle names; -1 if that is not to be had.
int OpenIpc(const char* reserved, bool is_event, IpcContents* contents) {
  std::memcpy(contents, reserved, sizeof *contents);
  if (contents->magic != kIpcMagic || (contents->is_event != 0) != is_event) {
    return -1;
  }
  const std::string path = "/proc/" + std::to_string(contents->pid) + "/fd/" +
                           std::to_string(contents->fd);
  return open(path.c_str(), O_RDWR | O_CLOEXEC);
}

template <class Object>
class Handles {
 public:
  Object* Add(std::unique_ptr<Object> object) {
    Object* const handle = object.get();
    live_[handle] = std::move(object);
    return handle;
  }
  bool Has(Object* handle) const { return live_.count(handle) != 0; }
  bool Remove(Object* handle) { return live_.erase(handle) != 0; }
  size_t size() const { return live_.size(); }

 private:
  std::map<Object*, std::unique_ptr<Object>> live_;
};

// The device, and what this process has of it. Never destroyed: threads of the
// process may outlive main.
struct Machine {
  static Machine& Get() {
    static Machine* const machine = new Machine;
    return *machine;
  }

  Schedule schedule;  // its mutex guards everything here

  // As the control door has set it.
  uint64_t capacity_bytes = uint64_t{1} << 30;
  int devices = 1;
  int version = 13000;
  std::map<int, int> attributes = {{10, 32},
                                   {16, 132},
                                   {18, 0},
                                   {20, 0},
                                   {33, 1},
                                   {34, 0},
                                   {38, 50 << 20},
                                   {41, 1},
                                   {50, 0},
                                   {75, 9},
                                   {76, 0},
                                   {91, 1},
                                   {97, kSharedOptinBytes},
                                   {99, 1},
                                   {102, 1},
                                   {103, 1},
                                   {113, 1},
                                   {125, 1}};
  struct Injection {
    std::string call;
    int countdown = 0;
    Result code = Result::kUnknown;
  };
  std::vector<Injection> injections;
  std::map<std::string, uint64_t> calls;

  pid_t initialised_by = 0;
  ContextObject primary;
  AddressSpace space;
  PinnedMemory pinned;
  uint64_t used_bytes = 0;
  MemHandle next_memory = 1;
  std::map<MemHandle, std::shared_ptr<Physical>> physical;
  Handles<StreamObject> streams;
  Handles<EventObject> events;
  Handles<ModuleObject> modules;
  Handles<FunctionObject> functions;
  Handles<GraphObject> graphs;
  Handles<GraphExecObject> execs;
  std::map<std::string, StandinKernel> kernels;

  std::thread background;
  std::atomic<bool> background_stops{false};

  std::string Leaks() const {
    std::ostringstream out;
    const auto count = [&](size_t n, const char* what) {
      if (n != 0) out << (out.tellp() > 0 ? ", " : "") << n << " " << what;
    };
    count(static_cast<size_t>(primary.references), "context");
    count(streams.size(), "stream");
    count(events.size(), "event");
    count(space.allocations(), "allocation");
    count(space.mappings(), "mapping");
    count(space.reservations(), "address range");
    count(physical.size(), "memory handle");
    count(pinned.registrations(), "host registration");
    count(pinned.allocations(), "host allocation");
    count(modules.size(), "module");
    count(graphs.size(), "graph");
    count(execs.size(), "executable graph");
    return out.str();
  }
};

thread_local std::vector<ContextObject*> current_contexts;

__attribute__((destructor)) void ReportLeaks() {
  Machine& m = Machine::Get();
  const Schedule::Lock lock(m.schedule.mutex());
  if (m.initialised_by != getpid()) return;
  const std::string leaks = m.Leaks();
  if (!leaks.empty()) {
    std::fprintf(stderr, "libcuda_standin: not given back: %s\n",
                 leaks.c_str());
  }
}

enum class Needs : uint8_t { kNothing, kInit, kContext };

// The door that every call comes through.
template <class Body>
Result Enter(const char* call, Needs needs, Body body) {
  Machine& m = Machine::Get();
  Schedule::Lock lock(m.schedule.mutex());
  ++m.calls[call];
  if (m.schedule.in_host_function()) return Result::kNotPermitted;
  for (auto it = m.injections.begin(); it != m.injections.end(); ++it) {
    if (it->call == call && --it->countdown == 0) {
      const Result code = it->code;
      m.injections.erase(it);
      return code;
    }
  }
  if (needs != Needs::kNothing && m.initialised_by != getpid()) {
    return Result::kNotInitialized;
  }
  if (needs == Needs::kContext) {
    if (m.schedule.lost() != Result::kSuccess) return m.schedule.lost();
    if (current_contexts.empty() || current_contexts.back() == nullptr ||
        m.primary.references == 0) {
      return Result::kInvalidContext;
    }
  }
  return body(m, lock);
}

std::shared_ptr<StreamState> Find(Machine& m, Stream stream) {
  if (stream == nullptr) return m.schedule.legacy();
  return m.streams.Has(stream) ? stream->state : nullptr;
}

// A step that touches the device's memory.
Step DeviceStep(Machine& m, std::function<Result()> work) {
  Step step;
  step.run = [&m, work = std::move(work)] {
    const OpenMemory open(m.space);
    return work();
  };
  return step;
}

Result Wrong(bool wrong) {
  return wrong ? Result::kIllegalAddress : Result::kSuccess;
}

void* HostAddress(DevicePtr address) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

// A word that the device reads or writes: its own, or pinned host memory.
bool WordReachable(Machine& m, DevicePtr address, bool write) {
  if (m.space.Allows(address, 4, write)) return true;
  const auto reach = m.pinned.Find(HostAddress(address), 4);
  return reach == PinnedMemory::Reach::kPinned ||
         (!write && reach == PinnedMemory::Reach::kReadOnly);
}

// The texts come without the lock: they are asked for while a call fails.
const Named* FindError(Result code) {
  for (const Named& error : kErrors) {
    if (error.code == code) return &error;
  }
  return nullptr;
}

}  // namespace

STANDIN_API Result cuGetErrorName(Result code, const char** text) {
  const Named* const error = FindError(code);
  *text = error != nullptr ? error->name : nullptr;
  return error != nullptr ? Result::kSuccess : Result::kInvalidValue;
}

STANDIN_API Result cuGetErrorString(Result code, const char** text) {
  const Named* const error = FindError(code);
  *text = error != nullptr ? error->text : nullptr;
  return error != nullptr ? Result::kSuccess : Result::kInvalidValue;
}

STANDIN_API Result cuInit(unsigned flags) {
  return Enter("cuInit", Needs::kNothing, [&](Machine& m, auto&) {
    if (flags != 0) return Result::kInvalidValue;
    if (m.devices == 0) return Result::kNoDevice;
    m.initialised_by = getpid();
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDriverGetVersion(int* version) {
  return Enter("cuDriverGetVersion", Needs::kNothing, [&](Machine& m, auto&) {
    *version = m.version;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceGetCount(int* count) {
  return Enter("cuDeviceGetCount", Needs::kInit, [&](Machine& m, auto&) {
    *count = m.devices;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceGet(Device* device, int ordinal) {
  return Enter("cuDeviceGet", Needs::kInit, [&](Machine& m, auto&) {
    if (ordinal < 0 || ordinal >= m.devices) return Result::kInvalidDevice;
    *device = ordinal;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceGetName(char* name, int size, Device device) {
  return Enter("cuDeviceGetName", Needs::kInit, [&](Machine& m, auto&) {
    if (device < 0 || device >= m.devices) return Result::kInvalidDevice;
    if (size < 1) return Result::kInvalidValue;
    std::snprintf(name, static_cast<size_t>(size), "Larder stand-in");
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceGetUuid_v2(Uuid* uuid, Device device) {
  return Enter("cuDeviceGetUuid", Needs::kInit, [&](Machine& m, auto&) {
    if (device < 0 || device >= m.devices) return Result::kInvalidDevice;
    for (int i = 0; i < 16; ++i) uuid->bytes[i] = static_cast<char>(0xa0 + i);
    uuid->bytes[15] = static_cast<char>(device);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceTotalMem_v2(size_t* bytes, Device device) {
  return Enter("cuDeviceTotalMem", Needs::kInit, [&](Machine& m, auto&) {
    if (device < 0 || device >= m.devices) return Result::kInvalidDevice;
    *bytes = m.capacity_bytes;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDeviceGetAttribute(int* value, DeviceAttribute which,
                                        Device device) {
  return Enter("cuDeviceGetAttribute", Needs::kInit, [&](Machine& m, auto&) {
    if (device < 0 || device >= m.devices) return Result::kInvalidDevice;
    const auto found = m.attributes.find(static_cast<int>(which));
    if (found == m.attributes.end()) return Result::kInvalidValue;
    *value = found->second;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuDevicePrimaryCtxRetain(ContextHandle* context,
                                            Device device) {
  return Enter("cuDevicePrimaryCtxRetain", Needs::kInit,
               [&](Machine& m, auto&) {
                 if (device != 0) return Result::kInvalidDevice;
                 if (m.schedule.lost() != Result::kSuccess) {
                   return m.schedule.lost();
                 }
                 ++m.primary.references;
                 *context = &m.primary;
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuDevicePrimaryCtxRelease_v2(Device device) {
  return Enter("cuDevicePrimaryCtxRelease", Needs::kInit,
               [&](Machine& m, auto&) {
                 if (device != 0) return Result::kInvalidDevice;
                 if (m.primary.references == 0) return Result::kInvalidContext;
                 --m.primary.references;
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuCtxPushCurrent_v2(ContextHandle context) {
  return Enter("cuCtxPushCurrent", Needs::kInit, [&](Machine& m, auto&) {
    if (context != &m.primary || m.primary.references == 0) {
      return Result::kInvalidContext;
    }
    current_contexts.push_back(context);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuCtxPopCurrent_v2(ContextHandle* context) {
  return Enter("cuCtxPopCurrent", Needs::kInit, [&](Machine&, auto&) {
    if (current_contexts.empty()) return Result::kInvalidContext;
    *context = current_contexts.back();
    current_contexts.pop_back();
    return Result::kSuccess;
  });
}

STANDIN_API Result cuCtxGetCurrent(ContextHandle* context) {
  return Enter("cuCtxGetCurrent", Needs::kInit, [&](Machine&, auto&) {
    *context = current_contexts.empty() ? nullptr : current_contexts.back();
    return Result::kSuccess;
  });
}

STANDIN_API Result cuCtxSynchronize() {
  return Enter("cuCtxSynchronize", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 const Result refused = m.schedule.RefuseInCapture(false);
                 if (refused != Result::kSuccess) return refused;
                 return m.schedule.RunAll(lock);
               });
}

STANDIN_API Result cuStreamCreate(Stream* stream, unsigned flags) {
  return Enter("cuStreamCreate", Needs::kContext, [&](Machine& m, auto&) {
    if (flags > kStreamNonBlocking) return Result::kInvalidValue;
    auto object = std::make_unique<StreamObject>();
    object->state = std::make_shared<StreamState>();
    object->state->blocking = flags != kStreamNonBlocking;
    m.schedule.AddStream(object->state);
    *stream = m.streams.Add(std::move(object));
    return Result::kSuccess;
  });
}

STANDIN_API Result cuStreamDestroy_v2(Stream stream) {
  return Enter("cuStreamDestroy", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.streams.Has(stream)) return Result::kInvalidHandle;
    m.schedule.RemoveStream(stream->state);
    m.streams.Remove(stream);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuStreamSynchronize(Stream stream) {
  return Enter("cuStreamSynchronize", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 const auto state = Find(m, stream);
                 if (state == nullptr) return Result::kInvalidHandle;
                 if (state->capture != nullptr) {
                   state->capture->invalid = true;
                   return Result::kStreamCaptureUnsupported;
                 }
                 return m.schedule.RunTo(lock, {state, state->enqueued});
               });
}

STANDIN_API Result cuStreamQuery(Stream stream) {
  return Enter(
      "cuStreamQuery", Needs::kContext, [&](Machine& m, Schedule::Lock& lock) {
        const auto state = Find(m, stream);
        if (state == nullptr) return Result::kInvalidHandle;
        if (state->capture != nullptr) {
          state->capture->invalid = true;
          return Result::kStreamCaptureUnsupported;
        }
        m.schedule.RunSome(lock);
        if (m.schedule.lost() != Result::kSuccess) {
          return m.schedule.lost();
        }
        return state->queue.empty() ? Result::kSuccess : Result::kNotReady;
      });
}

STANDIN_API Result cuStreamWaitEvent(Stream stream, Event event,
                                     unsigned flags) {
  return Enter("cuStreamWaitEvent", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr || !m.events.Has(event)) {
      return Result::kInvalidHandle;
    }
    if (flags != 0) return Result::kInvalidValue;
    const std::shared_ptr<EventState> e = event->state;
    if (e->capture != nullptr) {
      // The stream becomes part of the capture that the event is of.
      if (state->capture == nullptr) {
        state->capture = e->capture;
        state->frontier = e->frontier;
        e->capture->streams.insert(state.get());
        return Result::kSuccess;
      }
      if (state->capture != e->capture) return Result::kStreamCaptureIsolation;
      for (const uint32_t step : e->frontier) {
        if (std::find(state->frontier.begin(), state->frontier.end(), step) ==
            state->frontier.end()) {
          state->frontier.push_back(step);
        }
      }
      return Result::kSuccess;
    }
    if (state->capture != nullptr) {
      state->capture->invalid = true;
      return Result::kStreamCaptureIsolation;
    }
    Step step;
    step.run = [] { return Result::kSuccess; };
    std::vector<Position> after;
    if (e->imported) {
      const uint64_t number =
          __atomic_load_n(&e->shared->recorded, __ATOMIC_ACQUIRE);
      step.ready = [e, number] {
        return __atomic_load_n(&e->shared->completed, __ATOMIC_ACQUIRE) >=
               number;
      };
    } else if (e->recorded.has_value()) {
      after.push_back(*e->recorded);
    }
    return m.schedule.Enqueue(state, std::move(step), std::move(after));
  });
}

static Result StreamValue(const char* call, Stream stream, DevicePtr address,
                          uint32_t value, unsigned flags, bool write) {
  return Enter(call, Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (address % 4 != 0 || !WordReachable(m, address, write) ||
        flags > (write ? 0u : 2u)) {
      return Result::kInvalidValue;
    }
    if (write) {
      return m.schedule.Enqueue(
          state, DeviceStep(m, [&m, address, value] {
            if (!WordReachable(m, address, true)) return Wrong(true);
            __atomic_store_n(static_cast<uint32_t*>(HostAddress(address)),
                             value, __ATOMIC_RELEASE);
            return Result::kSuccess;
          }));
    }
    Step step;
    step.ready = [&m, address, value, flags] {
      if (!WordReachable(m, address, false)) return true;
      const OpenMemory open(m.space);
      const uint32_t seen = __atomic_load_n(
          static_cast<uint32_t*>(HostAddress(address)), __ATOMIC_ACQUIRE);
      switch (flags) {
        case kWaitValueEq:
          return seen == value;
        case kWaitValueAnd:
          return (seen & value) != 0;
        default:
          return static_cast<int32_t>(seen - value) >= 0;
      }
    };
    step.run = [&m, address] {
      return Wrong(!WordReachable(m, address, false));
    };
    return m.schedule.Enqueue(state, std::move(step));
  });
}

STANDIN_API Result cuStreamWaitValue32_v2(Stream stream, DevicePtr address,
                                          uint32_t value, unsigned flags) {
  return StreamValue("cuStreamWaitValue32", stream, address, value, flags,
                     false);
}

STANDIN_API Result cuStreamWriteValue32_v2(Stream stream, DevicePtr address,
                                           uint32_t value, unsigned flags) {
  return StreamValue("cuStreamWriteValue32", stream, address, value, flags,
                     true);
}

STANDIN_API Result cuLaunchHostFunc(Stream stream, HostFunction function,
                                    void* data) {
  return Enter("cuLaunchHostFunc", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (function == nullptr) return Result::kInvalidValue;
    Step step;
    step.host = [function, data] { function(data); };
    return m.schedule.Enqueue(state, std::move(step));
  });
}

STANDIN_API Result cuEventCreate(Event* event, unsigned flags) {
  return Enter("cuEventCreate", Needs::kContext, [&](Machine& m, auto&) {
    if (flags > 7) return Result::kInvalidValue;
    const bool shared = (flags & kEventInterprocess) != 0;
    if (shared && (flags & kEventDisableTiming) == 0) {
      return Result::kInvalidValue;
    }
    auto state = std::make_shared<EventState>();
    state->flags = flags;
    if (shared) {
      state->shared_fd = memfd_create("larder-standin-event", MFD_CLOEXEC);
      if (state->shared_fd < 0 ||
          ftruncate(state->shared_fd, sizeof(SharedEvent)) != 0) {
        return Result::kOutOfMemory;
      }
      void* const memory =
          mmap(nullptr, sizeof(SharedEvent), PROT_READ | PROT_WRITE, MAP_SHARED,
               state->shared_fd, 0);
      if (memory == MAP_FAILED) return Result::kOutOfMemory;
      state->shared = static_cast<SharedEvent*>(memory);
    }
    auto object = std::make_unique<EventObject>();
    object->state = std::move(state);
    *event = m.events.Add(std::move(object));
    return Result::kSuccess;
  });
}

STANDIN_API Result cuEventDestroy_v2(Event event) {
  return Enter("cuEventDestroy", Needs::kContext, [&](Machine& m, auto&) {
    return m.events.Remove(event) ? Result::kSuccess : Result::kInvalidHandle;
  });
}

STANDIN_API Result cuEventRecord(Event event, Stream stream) {
  return Enter("cuEventRecord", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr || !m.events.Has(event)) {
      return Result::kInvalidHandle;
    }
    const std::shared_ptr<EventState> e = event->state;
    if (e->imported) return Result::kInvalidHandle;
    if (state->capture != nullptr) {
      e->capture = state->capture;
      e->frontier = state->frontier;
      return Result::kSuccess;
    }
    e->capture = nullptr;
    uint64_t number = 0;
    if (e->shared != nullptr) {
      number = __atomic_add_fetch(&e->shared->recorded, 1, __ATOMIC_ACQ_REL);
    }
    Step step;
    step.run = [e, number] {
      e->time_ns = NowNs();
      if (e->shared != nullptr) {
        __atomic_store_n(&e->shared->completed, number, __ATOMIC_RELEASE);
      }
      return Result::kSuccess;
    };
    const Result result = m.schedule.Enqueue(state, std::move(step));
    if (result == Result::kSuccess) {
      e->recorded = Position{state, state->enqueued};
    }
    return result;
  });
}

static bool SharedEventReached(const EventState& e) {
  return __atomic_load_n(&e.shared->completed, __ATOMIC_ACQUIRE) >=
         __atomic_load_n(&e.shared->recorded, __ATOMIC_ACQUIRE);
}

STANDIN_API Result cuEventQuery(Event event) {
  return Enter(
      "cuEventQuery", Needs::kContext, [&](Machine& m, Schedule::Lock& lock) {
        if (!m.events.Has(event)) return Result::kInvalidHandle;
        const std::shared_ptr<EventState> e = event->state;
        if (e->capture != nullptr) return Result::kCapturedEvent;
        m.schedule.RunSome(lock);
        if (m.schedule.lost() != Result::kSuccess) {
          return m.schedule.lost();
        }
        const bool reached = e->imported ? SharedEventReached(*e)
                                         : !e->recorded.has_value() ||
                                               Schedule::Reached(*e->recorded);
        return reached ? Result::kSuccess : Result::kNotReady;
      });
}

STANDIN_API Result cuEventSynchronize(Event event) {
  return Enter("cuEventSynchronize", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 if (!m.events.Has(event)) return Result::kInvalidHandle;
                 const std::shared_ptr<EventState> e = event->state;
                 if (e->capture != nullptr) return Result::kCapturedEvent;
                 if (e->imported) {
                   return m.schedule.RunUntil(
                       lock, [&] { return SharedEventReached(*e); });
                 }
                 if (!e->recorded.has_value()) return Result::kSuccess;
                 return m.schedule.RunTo(lock, *e->recorded);
               });
}

STANDIN_API Result cuEventElapsedTime(float* milliseconds, Event begin,
                                      Event end) {
  return Enter("cuEventElapsedTime", Needs::kContext, [&](Machine& m, auto&) {
    for (const Event event : {begin, end}) {
      if (!m.events.Has(event) || !event->state->recorded.has_value() ||
          (event->state->flags & kEventDisableTiming) != 0) {
        return Result::kInvalidHandle;
      }
      if (!Schedule::Reached(*event->state->recorded)) {
        return Result::kNotReady;
      }
    }
    *milliseconds =
        static_cast<float>(end->state->time_ns - begin->state->time_ns) / 1e6F;
    return Result::kSuccess;
  });
}

// Copies between host and device. Pageable host memory is what the caller may
// change as soon as the call returns: it is read at once, and written before.
STANDIN_API Result cuMemcpyHtoDAsync_v2(DevicePtr to_dev, const void* from_host,
                                        size_t bytes, Stream stream) {
  return Enter("cuMemcpyHtoDAsync", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (bytes == 0) return Result::kSuccess;
    const auto reach = m.pinned.Find(from_host, bytes);
    if (!m.space.Allows(to_dev, bytes, true) || from_host == nullptr ||
        reach == PinnedMemory::Reach::kPartly) {
      return Result::kInvalidValue;
    }
    if (reach == PinnedMemory::Reach::kPageable && state->capture == nullptr) {
      std::vector<char> copy(bytes);
      std::memcpy(copy.data(), from_host, bytes);
      return m.schedule.Enqueue(
          state, DeviceStep(m, [&m, to_dev, copy = std::move(copy)] {
            if (!m.space.Allows(to_dev, copy.size(), true)) return Wrong(true);
            std::memcpy(HostAddress(to_dev), copy.data(), copy.size());
            return Result::kSuccess;
          }));
    }
    return m.schedule.Enqueue(
        state, DeviceStep(m, [&m, to_dev, from_host, bytes] {
          if (!m.space.Allows(to_dev, bytes, true)) return Wrong(true);
          std::memcpy(HostAddress(to_dev), from_host, bytes);
          return Result::kSuccess;
        }));
  });
}

STANDIN_API Result cuMemcpyDtoHAsync_v2(void* to_host, DevicePtr from_dev,
                                        size_t bytes, Stream stream) {
  return Enter("cuMemcpyDtoHAsync", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 const auto state = Find(m, stream);
                 if (state == nullptr) return Result::kInvalidHandle;
                 if (bytes == 0) return Result::kSuccess;
                 const auto reach = m.pinned.Find(to_host, bytes);
                 if (!m.space.Allows(from_dev, bytes, false) ||
                     to_host == nullptr ||
                     reach == PinnedMemory::Reach::kPartly ||
                     reach == PinnedMemory::Reach::kReadOnly) {
                   return Result::kInvalidValue;
                 }
                 const Result result = m.schedule.Enqueue(
                     state, DeviceStep(m, [&m, to_host, from_dev, bytes] {
                       if (!m.space.Allows(from_dev, bytes, false))
                         return Wrong(true);
                       std::memcpy(to_host, HostAddress(from_dev), bytes);
                       return Result::kSuccess;
                     }));
                 if (result != Result::kSuccess ||
                     reach != PinnedMemory::Reach::kPageable ||
                     state->capture != nullptr) {
                   return result;
                 }
                 return m.schedule.RunTo(lock, {state, state->enqueued});
               });
}

STANDIN_API Result cuMemcpyDtoDAsync_v2(DevicePtr to_dev, DevicePtr from_dev,
                                        size_t bytes, Stream stream) {
  return Enter("cuMemcpyDtoDAsync", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (bytes == 0) return Result::kSuccess;
    const auto allowed = [&m, to_dev, from_dev, bytes] {
      return m.space.Allows(to_dev, bytes, true) &&
             m.space.Allows(from_dev, bytes, false);
    };
    if (!allowed()) return Result::kInvalidValue;
    return m.schedule.Enqueue(
        state, DeviceStep(m, [allowed, to_dev, from_dev, bytes] {
          if (!allowed()) return Wrong(true);
          std::memmove(HostAddress(to_dev), HostAddress(from_dev), bytes);
          return Result::kSuccess;
        }));
  });
}

static Result MemsetAsync(const char* call, DevicePtr to_dev, uint32_t value,
                          size_t count, size_t width, Stream stream) {
  return Enter(call, Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (count == 0) return Result::kSuccess;
    const size_t bytes = count * width;
    if (to_dev % width != 0 || !m.space.Allows(to_dev, bytes, true)) {
      return Result::kInvalidValue;
    }
    return m.schedule.Enqueue(
        state, DeviceStep(m, [&m, to_dev, value, bytes, width] {
          if (!m.space.Allows(to_dev, bytes, true)) return Wrong(true);
          if (width == 1) {
            std::memset(HostAddress(to_dev), static_cast<int>(value), bytes);
          } else {
            std::fill_n(static_cast<uint32_t*>(HostAddress(to_dev)), bytes / 4,
                        value);
          }
          return Result::kSuccess;
        }));
  });
}

STANDIN_API Result cuMemsetD8Async(DevicePtr to_dev, unsigned char value,
                                   size_t count, Stream stream) {
  return MemsetAsync("cuMemsetD8Async", to_dev, value, count, 1, stream);
}

STANDIN_API Result cuMemsetD32Async(DevicePtr to_dev, unsigned value,
                                    size_t count, Stream stream) {
  return MemsetAsync("cuMemsetD32Async", to_dev, value, count, 4, stream);
}

STANDIN_API Result cuMemAlloc_v2(DevicePtr* address, size_t bytes) {
  return Enter("cuMemAlloc", Needs::kContext, [&](Machine& m, auto&) {
    if (bytes == 0) return Result::kInvalidValue;
    const Result refused = m.schedule.RefuseInCapture(true);
    if (refused != Result::kSuccess) return refused;
    auto physical =
        Physical::Make(bytes, true, &m.used_bytes, m.capacity_bytes);
    if (physical == nullptr) return Result::kOutOfMemory;
    *address =
        m.space.Attach(std::move(physical), bytes, AddressSpace::Kind::kAlloc);
    return *address == 0 ? Result::kOutOfMemory : Result::kSuccess;
  });
}

STANDIN_API Result cuMemFree_v2(DevicePtr address) {
  return Enter("cuMemFree", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 if (address == 0) return Result::kSuccess;
                 const Result refused = m.schedule.RefuseInCapture(true);
                 if (refused != Result::kSuccess) return refused;
                 uint64_t bytes = 0;
                 if (m.space.AllocationAt(address, &bytes) == nullptr) {
                   return Result::kInvalidValue;
                 }
                 const Result ran = m.schedule.RunAll(lock);
                 if (ran != Result::kSuccess) return ran;
                 m.space.Detach(address, AddressSpace::Kind::kAlloc);
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total_bytes) {
  return Enter("cuMemGetInfo", Needs::kContext, [&](Machine& m, auto&) {
    *total_bytes = m.capacity_bytes;
    *free_bytes = m.capacity_bytes - std::min(m.used_bytes, m.capacity_bytes);
    return Result::kSuccess;
  });
}

static bool IsOurs(const MemAllocationProp* prop) {
  return prop != nullptr && prop->type == AllocationType::kPinned &&
         prop->location.type == LocationType::kDevice &&
         prop->location.id == 0 && prop->win32_handle_meta_data == nullptr;
}

STANDIN_API Result cuMemGetAllocationGranularity(size_t* bytes,
                                                 const MemAllocationProp* prop,
                                                 Granularity) {
  return Enter("cuMemGetAllocationGranularity", Needs::kContext,
               [&](Machine&, auto&) {
                 if (!IsOurs(prop)) return Result::kInvalidValue;
                 *bytes = kGranularityBytes;
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuMemAddressReserve(DevicePtr* address, size_t bytes,
                                       size_t alignment, DevicePtr,
                                       unsigned long long flags) {
  return Enter("cuMemAddressReserve", Needs::kContext, [&](Machine& m, auto&) {
    if (bytes == 0 || bytes % kGranularityBytes != 0 || flags != 0 ||
        (alignment & (alignment - 1)) != 0) {
      return Result::kInvalidValue;
    }
    *address = m.space.Reserve(bytes, alignment);
    return *address == 0 ? Result::kOutOfMemory : Result::kSuccess;
  });
}

STANDIN_API Result cuMemAddressFree(DevicePtr address, size_t bytes) {
  return Enter("cuMemAddressFree", Needs::kContext, [&](Machine& m, auto&) {
    return m.space.FreeReservation(address, bytes) ? Result::kSuccess
                                                   : Result::kInvalidValue;
  });
}

STANDIN_API Result cuMemCreate(MemHandle* handle, size_t bytes,
                               const MemAllocationProp* prop,
                               unsigned long long flags) {
  return Enter("cuMemCreate", Needs::kContext, [&](Machine& m, auto&) {
    if (!IsOurs(prop) || bytes == 0 || bytes % kGranularityBytes != 0 ||
        flags != 0) {
      return Result::kInvalidValue;
    }
    auto physical = Physical::Make(
        bytes, prop->requested_handle_types == HandleType::kPosixFileDescriptor,
        &m.used_bytes, m.capacity_bytes);
    if (physical == nullptr) return Result::kOutOfMemory;
    *handle = m.next_memory++;
    m.physical[*handle] = std::move(physical);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuMemRelease(MemHandle handle) {
  return Enter("cuMemRelease", Needs::kContext, [&](Machine& m, auto&) {
    return m.physical.erase(handle) != 0 ? Result::kSuccess
                                         : Result::kInvalidValue;
  });
}

STANDIN_API Result cuMemMap(DevicePtr address, size_t bytes, size_t offset,
                            MemHandle handle, unsigned long long flags) {
  return Enter("cuMemMap", Needs::kContext, [&](Machine& m, auto&) {
    const auto found = m.physical.find(handle);
    if (found == m.physical.end() || offset != 0 || flags != 0) {
      return Result::kInvalidValue;
    }
    return m.space.Map(address, bytes, found->second) ? Result::kSuccess
                                                      : Result::kInvalidValue;
  });
}

STANDIN_API Result cuMemUnmap(DevicePtr address, size_t bytes) {
  return Enter("cuMemUnmap", Needs::kContext, [&](Machine& m, auto&) {
    return m.space.Unmap(address, bytes) ? Result::kSuccess
                                         : Result::kInvalidValue;
  });
}

STANDIN_API Result cuMemSetAccess(DevicePtr address, size_t bytes,
                                  const MemAccessDesc* desc, size_t count) {
  return Enter("cuMemSetAccess", Needs::kContext, [&](Machine& m, auto&) {
    if (desc == nullptr || count != 1 ||
        desc->location.type != LocationType::kDevice ||
        desc->location.id != 0) {
      return Result::kInvalidValue;
    }
    const bool write = desc->flags == AccessFlags::kReadWrite;
    const bool read = write || desc->flags == AccessFlags::kRead;
    return m.space.SetAccess(address, bytes, read, write)
               ? Result::kSuccess
               : Result::kInvalidValue;
  });
}

STANDIN_API Result cuMemExportToShareableHandle(void* shareable,
                                                MemHandle handle,
                                                HandleType type,
                                                unsigned long long flags) {
  return Enter("cuMemExportToShareableHandle", Needs::kContext,
               [&](Machine& m, auto&) {
                 const auto found = m.physical.find(handle);
                 if (found == m.physical.end() || flags != 0 ||
                     type != HandleType::kPosixFileDescriptor ||
                     !found->second->exportable()) {
                   return Result::kInvalidValue;
                 }
                 const int fd = fcntl(found->second->fd(), F_DUPFD_CLOEXEC, 0);
                 if (fd < 0) return Result::kOutOfMemory;
                 std::memcpy(shareable, &fd, sizeof fd);
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuMemImportFromShareableHandle(MemHandle* handle,
                                                  void* os_handle,
                                                  HandleType type) {
  return Enter("cuMemImportFromShareableHandle", Needs::kContext,
               [&](Machine& m, auto&) {
                 if (type != HandleType::kPosixFileDescriptor) {
                   return Result::kInvalidValue;
                 }
                 const int fd = fcntl(
                     static_cast<int>(reinterpret_cast<intptr_t>(os_handle)),
                     F_DUPFD_CLOEXEC, 0);
                 if (fd < 0) return Result::kInvalidValue;
                 auto physical = Physical::Import(fd);
                 if (physical == nullptr) return Result::kInvalidValue;
                 *handle = m.next_memory++;
                 m.physical[*handle] = std::move(physical);
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
  return Enter("cuMemHostAlloc", Needs::kContext, [&](Machine& m, auto&) {
    if (bytes == 0 || flags > 7) return Result::kInvalidValue;
    *memory = m.pinned.Alloc(bytes);
    return *memory == nullptr ? Result::kOutOfMemory : Result::kSuccess;
  });
}

STANDIN_API Result cuMemFreeHost(void* memory) {
  return Enter("cuMemFreeHost", Needs::kContext,
               [&](Machine& m, Schedule::Lock& lock) {
                 const Result ran = m.schedule.RunAll(lock);
                 if (ran != Result::kSuccess) return ran;
                 return m.pinned.Free(memory);
               });
}

STANDIN_API Result cuMemHostRegister_v2(void* memory, size_t bytes,
                                        unsigned flags) {
  return Enter("cuMemHostRegister", Needs::kContext, [&](Machine& m, auto&) {
    if (flags > 15) return Result::kInvalidValue;
    const bool read_only = (flags & kHostRegisterReadOnly) != 0;
    if (read_only &&
        m.attributes[static_cast<int>(
            DeviceAttribute::kReadOnlyHostRegisterSupported)] == 0) {
      return Result::kNotSupported;
    }
    return m.pinned.Register(memory, bytes, read_only);
  });
}

STANDIN_API Result cuMemHostUnregister(void* memory) {
  return Enter("cuMemHostUnregister", Needs::kContext,
               [&](Machine& m, auto&) { return m.pinned.Unregister(memory); });
}

STANDIN_API Result cuMemHostGetDevicePointer_v2(DevicePtr* address,
                                                void* memory, unsigned flags) {
  return Enter("cuMemHostGetDevicePointer", Needs::kContext,
               [&](Machine& m, auto&) {
                 const auto reach = m.pinned.Find(memory, 1);
                 if (flags != 0 || reach == PinnedMemory::Reach::kPageable) {
                   return Result::kInvalidValue;
                 }
                 *address = reinterpret_cast<uintptr_t>(memory);
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuIpcGetMemHandle(IpcMemHandle* handle, DevicePtr address) {
  return Enter("cuIpcGetMemHandle", Needs::kContext, [&](Machine& m, auto&) {
    IpcContents contents = {};
    const auto physical = m.space.AllocationAt(address, &contents.bytes);
    if (physical == nullptr) return Result::kInvalidValue;
    contents.magic = kIpcMagic;
    contents.pid = getpid();
    contents.fd = physical->fd();
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle->reserved, &contents, sizeof contents);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuIpcOpenMemHandle_v2(DevicePtr* address,
                                         IpcMemHandle handle, unsigned flags) {
  return Enter("cuIpcOpenMemHandle", Needs::kContext, [&](Machine& m, auto&) {
    if (flags != kIpcMemLazyEnablePeerAccess) return Result::kInvalidValue;
    IpcContents contents;
    const int fd = OpenIpc(handle.reserved, false, &contents);
    if (contents.magic == kIpcMagic && contents.pid == getpid()) {
      if (fd >= 0) close(fd);
      return Result::kInvalidContext;  // not in the process that made it
    }
    if (fd < 0) return Result::kInvalidHandle;
    auto physical = Physical::Import(fd);
    if (physical == nullptr) return Result::kInvalidHandle;
    *address = m.space.Attach(std::move(physical), contents.bytes,
                              AddressSpace::Kind::kIpc);
    return *address == 0 ? Result::kOutOfMemory : Result::kSuccess;
  });
}

STANDIN_API Result cuIpcCloseMemHandle(DevicePtr address) {
  return Enter("cuIpcCloseMemHandle", Needs::kContext, [&](Machine& m, auto&) {
    return m.space.Detach(address, AddressSpace::Kind::kIpc)
               ? Result::kSuccess
               : Result::kInvalidValue;
  });
}

STANDIN_API Result cuIpcGetEventHandle(IpcEventHandle* handle, Event event) {
  return Enter("cuIpcGetEventHandle", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.events.Has(event) || event->state->shared == nullptr ||
        event->state->imported) {
      return Result::kInvalidHandle;
    }
    IpcContents contents = {};
    contents.magic = kIpcMagic;
    contents.pid = getpid();
    contents.fd = event->state->shared_fd;
    contents.is_event = 1;
    std::memset(handle, 0, sizeof *handle);
    std::memcpy(handle->reserved, &contents, sizeof contents);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuIpcOpenEventHandle(Event* event, IpcEventHandle handle) {
  return Enter("cuIpcOpenEventHandle", Needs::kContext, [&](Machine& m, auto&) {
    IpcContents contents;
    const int fd = OpenIpc(handle.reserved, true, &contents);
    if (fd < 0) return Result::kInvalidHandle;
    void* const memory = mmap(nullptr, sizeof(SharedEvent),
                              PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
      close(fd);
      return Result::kOutOfMemory;
    }
    auto state = std::make_shared<EventState>();
    state->flags = kEventInterprocess | kEventDisableTiming;
    state->shared_fd = fd;
    state->shared = static_cast<SharedEvent*>(memory);
    state->imported = true;
    auto object = std::make_unique<EventObject>();
    object->state = std::move(state);
    *event = m.events.Add(std::move(object));
    return Result::kSuccess;
  });
}

STANDIN_API Result cuModuleLoadData(ModuleHandle* module, const void* image) {
  return Enter("cuModuleLoadData", Needs::kContext, [&](Machine& m, auto&) {
    if (image == nullptr) return Result::kInvalidValue;
    uint32_t magic = 0;
    std::memcpy(&magic, image, sizeof magic);
    const bool ptx = std::memcmp(image, ".ver", sizeof magic) == 0;
    if (magic != kFatbinMagic && magic != kFatbinWrapperMagic &&
        magic != kElfMagic && !ptx) {
      return Result::kInvalidImage;
    }
    *module = m.modules.Add(std::make_unique<ModuleObject>());
    return Result::kSuccess;
  });
}

STANDIN_API Result cuModuleUnload(ModuleHandle module) {
  return Enter("cuModuleUnload", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.modules.Has(module)) return Result::kInvalidHandle;
    for (const auto& [name, function] : module->functions) {
      m.functions.Remove(function);
    }
    m.modules.Remove(module);
    return Result::kSuccess;
  });
}

STANDIN_API Result cuModuleGetFunction(Function* function, ModuleHandle module,
                                       const char* name) {
  return Enter("cuModuleGetFunction", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.modules.Has(module)) return Result::kInvalidHandle;
    if (name == nullptr) return Result::kInvalidValue;
    const auto known = module->functions.find(name);
    if (known != module->functions.end()) {
      *function = known->second;
      return Result::kSuccess;
    }
    auto object = std::make_unique<FunctionObject>();
    const auto kernel = m.kernels.find(name);
    if (kernel != m.kernels.end()) {
      object->kernel = kernel->second;
    } else {
      object->compiled = simt::FindKernel(name);
      if (object->compiled == nullptr) return Result::kNotFound;
    }
    *function = m.functions.Add(std::move(object));
    module->functions[name] = *function;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuFuncGetAttribute(int* value, FunctionAttribute which,
                                      Function function) {
  return Enter("cuFuncGetAttribute", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.functions.Has(function)) return Result::kInvalidHandle;
    switch (which) {
      case FunctionAttribute::kMaxThreadsPerBlock:
        *value = function->compiled != nullptr
                     ? static_cast<int>(function->compiled->max_threads)
                     : 1024;
        return Result::kSuccess;
      case FunctionAttribute::kSharedSizeBytes:
      case FunctionAttribute::kLocalSizeBytes:
        *value = 0;
        return Result::kSuccess;
      case FunctionAttribute::kNumRegs:
        *value = 32;
        return Result::kSuccess;
      case FunctionAttribute::kMaxDynamicSharedSizeBytes:
        *value = function->dynamic_shared_bytes_max;
        return Result::kSuccess;
    }
    return Result::kInvalidValue;
  });
}

STANDIN_API Result cuFuncSetAttribute(Function function,
                                      FunctionAttribute which, int value) {
  return Enter("cuFuncSetAttribute", Needs::kContext, [&](Machine& m, auto&) {
    if (!m.functions.Has(function)) return Result::kInvalidHandle;
    if (which != FunctionAttribute::kMaxDynamicSharedSizeBytes || value < 0 ||
        value > kSharedOptinBytes) {
      return Result::kInvalidValue;
    }
    function->dynamic_shared_bytes_max = value;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuLaunchKernel(Function function, unsigned grid_x,
                                  unsigned grid_y, unsigned grid_z,
                                  unsigned block_x, unsigned block_y,
                                  unsigned block_z, unsigned shared_bytes,
                                  Stream stream, void** params, void** extra) {
  return Enter("cuLaunchKernel", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr || !m.functions.Has(function)) {
      return Result::kInvalidHandle;
    }
    // Parameters come as one buffer here: the stand-in knows no kernel's list.
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_y > 65535 ||
        grid_z > 65535 || block_x == 0 || block_y != 1 || block_z != 1 ||
        block_x > 1024 || params != nullptr ||
        shared_bytes >
            static_cast<unsigned>(function->dynamic_shared_bytes_max)) {
      return Result::kInvalidValue;
    }
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (; extra != nullptr && *extra != kLaunchParamEnd; extra += 2) {
      if (extra[0] == kLaunchParamBufferPointer) {
        buffer = extra[1];
      } else if (extra[0] == kLaunchParamBufferSize) {
        bytes = *static_cast<const size_t*>(extra[1]);
      } else {
        return Result::kInvalidValue;
      }
    }
    if (bytes > 4096 || (bytes > 0 && buffer == nullptr)) {
      return Result::kInvalidValue;
    }
    // As the device has it: by value, and aligned.
    std::vector<uint64_t> copy((bytes + 7) / 8);
    if (bytes > 0) std::memcpy(copy.data(), buffer, bytes);
    if (const simt::Kernel* const compiled = function->compiled) {
      if (bytes != compiled->params_bytes || block_x > compiled->max_threads) {
        return Result::kInvalidValue;
      }
      return m.schedule.Enqueue(
          state, DeviceStep(m, [=, &m, copy = std::move(copy)] {
            const std::optional<std::string> wrong = simt::Launch(
                *compiled, {grid_x, grid_y, grid_z}, {block_x, 1, 1},
                shared_bytes, copy.data(), bytes, {true, m.schedule.Draw()});
            if (!wrong.has_value()) return Result::kSuccess;
            std::fprintf(stderr, "libcuda_standin: %s: %s\n", compiled->name,
                         wrong->c_str());
            return Result::kLaunchFailed;
          }));
    }
    const StandinKernel kernel = function->kernel;
    return m.schedule.Enqueue(
        state, DeviceStep(m, [=, copy = std::move(copy)] {
          const uint32_t grid[3] = {grid_x, grid_y, grid_z};
          return static_cast<Result>(
              kernel(grid, block_x, shared_bytes, copy.data(), bytes));
        }));
  });
}

STANDIN_API Result cuStreamBeginCapture_v2(Stream stream, CaptureMode mode) {
  return Enter("cuStreamBeginCapture", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    return m.schedule.BeginCapture(state, mode == CaptureMode::kGlobal);
  });
}

STANDIN_API Result cuStreamEndCapture(Stream stream, Graph* graph) {
  return Enter("cuStreamEndCapture", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    auto object = std::make_unique<GraphObject>();
    const Result result = m.schedule.EndCapture(state, &object->state.steps);
    *graph = nullptr;
    if (result == Result::kSuccess) *graph = m.graphs.Add(std::move(object));
    return result;
  });
}

STANDIN_API Result cuStreamIsCapturing(Stream stream, CaptureStatus* status) {
  return Enter("cuStreamIsCapturing", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    *status = state->capture == nullptr ? CaptureStatus::kNone
              : state->capture->invalid ? CaptureStatus::kInvalidated
                                        : CaptureStatus::kActive;
    return Result::kSuccess;
  });
}

STANDIN_API Result cuGraphInstantiateWithFlags(GraphExec* exec, Graph graph,
                                               unsigned long long flags) {
  return Enter("cuGraphInstantiateWithFlags", Needs::kContext,
               [&](Machine& m, auto&) {
                 if (!m.graphs.Has(graph) || flags != 0) {
                   return Result::kInvalidValue;
                 }
                 auto object = std::make_unique<GraphExecObject>();
                 object->state.steps = graph->state.steps;
                 *exec = m.execs.Add(std::move(object));
                 return Result::kSuccess;
               });
}

STANDIN_API Result cuGraphLaunch(GraphExec exec, Stream stream) {
  return Enter("cuGraphLaunch", Needs::kContext, [&](Machine& m, auto&) {
    const auto state = Find(m, stream);
    if (state == nullptr) return Result::kInvalidHandle;
    if (!m.execs.Has(exec)) return Result::kInvalidValue;
    return m.schedule.EnqueueGraph(state, exec->state);
  });
}

STANDIN_API Result cuGraphDestroy(Graph graph) {
  return Enter("cuGraphDestroy", Needs::kContext, [&](Machine& m, auto&) {
    return m.graphs.Remove(graph) ? Result::kSuccess : Result::kInvalidValue;
  });
}

STANDIN_API Result cuGraphExecDestroy(GraphExec exec) {
  return Enter("cuGraphExecDestroy", Needs::kContext, [&](Machine& m, auto&) {
    return m.execs.Remove(exec) ? Result::kSuccess : Result::kInvalidValue;
  });
}

STANDIN_API Result cuGetProcAddress_v2(const char* name, void** address,
                                       int version, uint64_t flags,
                                       int* status) {
  struct Entry {
    const char* name;
    int version;
    void* address;
  };
  static const Entry kEntries[] = {
      {"cuInit", 2000, reinterpret_cast<void*>(&cuInit)},
      {"cuDriverGetVersion", 2020,
       reinterpret_cast<void*>(&cuDriverGetVersion)},
      {"cuGetErrorName", 6000, reinterpret_cast<void*>(&cuGetErrorName)},
      {"cuGetErrorString", 6000, reinterpret_cast<void*>(&cuGetErrorString)},
      {"cuDeviceGetCount", 2000, reinterpret_cast<void*>(&cuDeviceGetCount)},
      {"cuDeviceGet", 2000, reinterpret_cast<void*>(&cuDeviceGet)},
      {"cuDeviceGetName", 2000, reinterpret_cast<void*>(&cuDeviceGetName)},
      {"cuDeviceGetUuid", 11040, reinterpret_cast<void*>(&cuDeviceGetUuid_v2)},
      {"cuDeviceTotalMem", 3020, reinterpret_cast<void*>(&cuDeviceTotalMem_v2)},
      {"cuDeviceGetAttribute", 2000,
       reinterpret_cast<void*>(&cuDeviceGetAttribute)},
      {"cuDevicePrimaryCtxRetain", 7000,
       reinterpret_cast<void*>(&cuDevicePrimaryCtxRetain)},
      {"cuDevicePrimaryCtxRelease", 11000,
       reinterpret_cast<void*>(&cuDevicePrimaryCtxRelease_v2)},
      {"cuCtxPushCurrent", 4000, reinterpret_cast<void*>(&cuCtxPushCurrent_v2)},
      {"cuCtxPopCurrent", 4000, reinterpret_cast<void*>(&cuCtxPopCurrent_v2)},
      {"cuCtxGetCurrent", 4000, reinterpret_cast<void*>(&cuCtxGetCurrent)},
      {"cuCtxSynchronize", 2000, reinterpret_cast<void*>(&cuCtxSynchronize)},
      {"cuStreamCreate", 2000, reinterpret_cast<void*>(&cuStreamCreate)},
      {"cuStreamDestroy", 4000, reinterpret_cast<void*>(&cuStreamDestroy_v2)},
      {"cuStreamSynchronize", 2000,
       reinterpret_cast<void*>(&cuStreamSynchronize)},
      {"cuStreamQuery", 2000, reinterpret_cast<void*>(&cuStreamQuery)},
      {"cuStreamWaitEvent", 3020, reinterpret_cast<void*>(&cuStreamWaitEvent)},
      {"cuStreamWaitValue32", 11070,
       reinterpret_cast<void*>(&cuStreamWaitValue32_v2)},
      {"cuStreamWriteValue32", 11070,
       reinterpret_cast<void*>(&cuStreamWriteValue32_v2)},
      {"cuLaunchHostFunc", 10000, reinterpret_cast<void*>(&cuLaunchHostFunc)},
      {"cuEventCreate", 2000, reinterpret_cast<void*>(&cuEventCreate)},
      {"cuEventDestroy", 4000, reinterpret_cast<void*>(&cuEventDestroy_v2)},
      {"cuEventRecord", 2000, reinterpret_cast<void*>(&cuEventRecord)},
      {"cuEventQuery", 2000, reinterpret_cast<void*>(&cuEventQuery)},
      {"cuEventSynchronize", 2000,
       reinterpret_cast<void*>(&cuEventSynchronize)},
      {"cuEventElapsedTime", 2000,
       reinterpret_cast<void*>(&cuEventElapsedTime)},
      {"cuMemcpyHtoDAsync", 3020,
       reinterpret_cast<void*>(&cuMemcpyHtoDAsync_v2)},
      {"cuMemcpyDtoHAsync", 3020,
       reinterpret_cast<void*>(&cuMemcpyDtoHAsync_v2)},
      {"cuMemcpyDtoDAsync", 3020,
       reinterpret_cast<void*>(&cuMemcpyDtoDAsync_v2)},
      {"cuMemsetD8Async", 3020, reinterpret_cast<void*>(&cuMemsetD8Async)},
      {"cuMemsetD32Async", 3020, reinterpret_cast<void*>(&cuMemsetD32Async)},
      {"cuMemAlloc", 3020, reinterpret_cast<void*>(&cuMemAlloc_v2)},
      {"cuMemFree", 3020, reinterpret_cast<void*>(&cuMemFree_v2)},
      {"cuMemGetInfo", 3020, reinterpret_cast<void*>(&cuMemGetInfo_v2)},
      {"cuMemGetAllocationGranularity", 10020,
       reinterpret_cast<void*>(&cuMemGetAllocationGranularity)},
      {"cuMemAddressReserve", 10020,
       reinterpret_cast<void*>(&cuMemAddressReserve)},
      {"cuMemAddressFree", 10020, reinterpret_cast<void*>(&cuMemAddressFree)},
      {"cuMemCreate", 10020, reinterpret_cast<void*>(&cuMemCreate)},
      {"cuMemRelease", 10020, reinterpret_cast<void*>(&cuMemRelease)},
      {"cuMemMap", 10020, reinterpret_cast<void*>(&cuMemMap)},
      {"cuMemUnmap", 10020, reinterpret_cast<void*>(&cuMemUnmap)},
      {"cuMemSetAccess", 10020, reinterpret_cast<void*>(&cuMemSetAccess)},
      {"cuMemExportToShareableHandle", 10020,
       reinterpret_cast<void*>(&cuMemExportToShareableHandle)},
      {"cuMemImportFromShareableHandle", 10020,
       reinterpret_cast<void*>(&cuMemImportFromShareableHandle)},
      {"cuMemHostAlloc", 2020, reinterpret_cast<void*>(&cuMemHostAlloc)},
      {"cuMemFreeHost", 2000, reinterpret_cast<void*>(&cuMemFreeHost)},
      {"cuMemHostRegister", 6050,
       reinterpret_cast<void*>(&cuMemHostRegister_v2)},
      {"cuMemHostUnregister", 4000,
       reinterpret_cast<void*>(&cuMemHostUnregister)},
      {"cuMemHostGetDevicePointer", 3020,
       reinterpret_cast<void*>(&cuMemHostGetDevicePointer_v2)},
      {"cuIpcGetMemHandle", 4010, reinterpret_cast<void*>(&cuIpcGetMemHandle)},
      {"cuIpcOpenMemHandle", 11000,
       reinterpret_cast<void*>(&cuIpcOpenMemHandle_v2)},
      {"cuIpcCloseMemHandle", 4010,
       reinterpret_cast<void*>(&cuIpcCloseMemHandle)},
      {"cuIpcGetEventHandle", 4010,
       reinterpret_cast<void*>(&cuIpcGetEventHandle)},
      {"cuIpcOpenEventHandle", 4010,
       reinterpret_cast<void*>(&cuIpcOpenEventHandle)},
      {"cuModuleLoadData", 2000, reinterpret_cast<void*>(&cuModuleLoadData)},
      {"cuModuleUnload", 2000, reinterpret_cast<void*>(&cuModuleUnload)},
      {"cuModuleGetFunction", 2000,
       reinterpret_cast<void*>(&cuModuleGetFunction)},
      {"cuFuncGetAttribute", 2020,
       reinterpret_cast<void*>(&cuFuncGetAttribute)},
      {"cuFuncSetAttribute", 9000,
       reinterpret_cast<void*>(&cuFuncSetAttribute)},
      {"cuLaunchKernel", 4000, reinterpret_cast<void*>(&cuLaunchKernel)},
      {"cuStreamBeginCapture", 10010,
       reinterpret_cast<void*>(&cuStreamBeginCapture_v2)},
      {"cuStreamEndCapture", 10000,
       reinterpret_cast<void*>(&cuStreamEndCapture)},
      {"cuStreamIsCapturing", 10000,
       reinterpret_cast<void*>(&cuStreamIsCapturing)},
      {"cuGraphInstantiateWithFlags", 11040,
       reinterpret_cast<void*>(&cuGraphInstantiateWithFlags)},
      {"cuGraphLaunch", 10000, reinterpret_cast<void*>(&cuGraphLaunch)},
      {"cuGraphDestroy", 10000, reinterpret_cast<void*>(&cuGraphDestroy)},
      {"cuGraphExecDestroy", 10000,
       reinterpret_cast<void*>(&cuGraphExecDestroy)},
  };
  return Enter("cuGetProcAddress", Needs::kNothing, [&](Machine&, auto&) {
    *address = nullptr;
    if (flags > 2) return Result::kInvalidValue;
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) != 0) continue;
      if (status != nullptr) *status = version < entry.version ? 2 : 0;
      if (version < entry.version) return Result::kNotFound;
      *address = entry.address;
      return Result::kSuccess;
    }
    if (status != nullptr) *status = 1;
    return Result::kNotFound;
  });
}

namespace {

// Commands

bool RunCommand(Machine& m, Schedule::Lock& lock, std::istringstream& in,
                std::string* answer) {
  std::string verb;
  in >> verb;
  const auto fail = [&](const char* why) {
    *answer = why;
    return false;
  };
  if (verb == "seed") {
    uint64_t seed = 0;
    if (!(in >> seed)) return fail("seed N");
    m.schedule.Seed(seed);
  } else if (verb == "memory") {
    uint64_t bytes = 0;
    if (!(in >> bytes)) return fail("memory BYTES");
    m.capacity_bytes = bytes;
  } else if (verb == "attribute") {
    int which = 0;
    int value = 0;
    if (!(in >> which >> value)) return fail("attribute N VALUE");
    m.attributes[which] = value;
  } else if (verb == "devices") {
    int devices = 0;
    if (!(in >> devices) || devices < 0) return fail("devices N");
    m.devices = devices;
  } else if (verb == "version") {
    if (!(in >> m.version)) return fail("version N");
  } else if (verb == "fail") {
    Machine::Injection injection;
    int code = 0;
    if (!(in >> injection.call >> injection.countdown >> code) ||
        injection.countdown < 1 || code == 0) {
      return fail("fail CALL N CODE");
    }
    injection.code = static_cast<Result>(code);
    m.injections.push_back(std::move(injection));
  } else if (verb == "lose") {
    int code = 0;
    if (!(in >> code) || code == 0) return fail("lose CODE");
    m.schedule.Lose(static_cast<Result>(code));
  } else if (verb == "background") {
    int on = 0;
    if (!(in >> on)) return fail("background 0|1");
    if (on != 0 && !m.background.joinable()) {
      m.background_stops = false;
      m.background = std::thread([&m] {
        while (!m.background_stops) {
          {
            Schedule::Lock inner(m.schedule.mutex());
            m.schedule.RunSome(inner);
          }
          sched_yield();
        }
      });
    } else if (on == 0 && m.background.joinable()) {
      m.background_stops = true;
      lock.unlock();
      m.background.join();
      lock.lock();
    }
  } else if (verb == "calls") {
    std::string call;
    in >> call;
    *answer = std::to_string(m.calls[call]);
  } else if (verb == "leaks") {
    *answer = m.Leaks();
  } else if (verb == "reset") {
    *answer = m.Leaks();
    // A lost context takes all that was its own along.
    if (m.schedule.lost() == Result::kSuccess && !answer->empty()) return false;
    answer->clear();
    m.schedule.Recover();
    m.streams = {};
    m.events = {};
    m.modules = {};
    m.functions = {};
    m.graphs = {};
    m.execs = {};
    m.physical.clear();
    m.space.Clear();
    m.pinned.Clear();
    m.primary.references = 0;
    const Machine defaults;
    m.capacity_bytes = defaults.capacity_bytes;
    m.devices = defaults.devices;
    m.version = defaults.version;
    m.attributes = defaults.attributes;
    m.injections.clear();
    m.calls.clear();
    m.schedule.Seed(1);
  } else {
    return fail("no such command");
  }
  return true;
}

}  // namespace
}  // namespace larder::standin

using larder::standin::Schedule;

STANDIN_API int standinControl(const char* command, char* answer, size_t size) {
  larder::standin::Machine& m = larder::standin::Machine::Get();
  Schedule::Lock lock(m.schedule.mutex());
  std::istringstream in(command);
  std::string text;
  const bool done = larder::standin::RunCommand(m, lock, in, &text);
  if (answer != nullptr && size > 0) {
    std::snprintf(answer, size, "%s", text.c_str());
  }
  return done ? 0 : -1;
}

STANDIN_API void standinRegisterKernel(const char* name, StandinKernel kernel) {
  larder::standin::Machine& m = larder::standin::Machine::Get();
  const Schedule::Lock lock(m.schedule.mutex());
  m.kernels[name] = kernel;
}
