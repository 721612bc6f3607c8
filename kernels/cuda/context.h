#ifndef LARDER_KERNELS_CUDA_CONTEXT_H_
#define LARDER_KERNELS_CUDA_CONTEXT_H_

// Devices and the process's context on one.

#include <memory>
#include <string>

#include "kernels/cuda/driver.h"

namespace larder::kernels::cuda {

// What Larder wants to know of a device.
struct DeviceInfo {
  int ordinal = 0;
  std::string name;  // "NVIDIA H100 80GB HBM3"
  std::string uuid;  // "GPU-0f3a...": as nvidia-smi prints it
  uint64_t memory_bytes = 0;
  int compute_major = 0;  // 9 and 0: sm_90
  int compute_minor = 0;
  int multiprocessors = 0;
  uint64_t l2_cache_bytes = 0;
  uint64_t shared_bytes_max = 0;  // of a block, when a kernel asks for it
  bool integrated = false;        // its memory is the host's
  // Host memory can be registered, also such that this process may only read.
  bool registers_host_memory = false;
  bool registers_read_only_memory = false;
  // Physical memory can be mapped at will, and exported as a file descriptor.
  bool maps_memory = false;
  bool exports_memory = false;
};

// Of device `ordinal`, 0 to driver.device_count() - 1. Needs no context.
Error GetDeviceInfo(const Driver& driver, int ordinal, DeviceInfo* info);

// The process's primary context on a device, shared with the CUDA runtime and
// so with every framework in the process, kept alive by this object.
//
// Thread-safe. `driver` outlives it.
class Context {
 public:
  // Null on error. The first one in a process takes tenths of a second and some
  // hundred MiB of device memory.
  static std::unique_ptr<Context> Retain(const Driver& driver, int ordinal,
                                         Error* error);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Makes the context current on this thread while it lives; whichever was
  // before is so again afterwards.
  class Scope {
   public:
    explicit Scope(const Context& context);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    // Why it could not be (the device was lost); calls fail then, too.
    const Error& error() const { return error_; }

   private:
    const Driver& driver_;
    Error error_;
  };

  const Driver& driver() const { return driver_; }
  const DeviceInfo& info() const { return info_; }
  Device device() const { return device_; }
  ContextHandle handle() const { return handle_; }

 private:
  explicit Context(const Driver& driver) : driver_(driver) {}

  const Driver& driver_;
  DeviceInfo info_;
  Device device_ = 0;
  ContextHandle handle_ = nullptr;
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CONTEXT_H_
