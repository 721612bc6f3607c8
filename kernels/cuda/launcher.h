#ifndef LARDER_KERNELS_CUDA_LAUNCHER_H_
#define LARDER_KERNELS_CUDA_LAUNCHER_H_

// Carries out launch plans on a device.

#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

// The kernels of one image in one context, ready to be started.
//
// Thread-safe. `context` outlives it, and so does whatever it launched: its end
// unloads the code, so nothing of it may still run.
class Launcher {
 public:
  // Loads the image (a fat binary or PTX: as nvcc made it) and looks up
  // `entries`, the names of its kernels; each may then use all the dynamic
  // shared memory that the device has. Null on error.
  static std::unique_ptr<Launcher> Load(const Context& context,
                                        const void* image,
                                        const std::vector<const char*>& entries,
                                        Error* error);
  ~Launcher();
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  // Puts the kernel of the plan on `stream`, its parameters by value. Allocates
  // nothing and waits for nothing, so it may be captured. The context must be
  // current. A plan without an entry does nothing; one whose entry was not
  // loaded is kNotFound.
  template <typename Params>
  Error Launch(const LaunchPlan& plan, const Params& params,
               Stream stream) const {
    static_assert(std::is_trivially_copyable_v<Params>);
    return LaunchBytes(plan, &params, sizeof params, stream);
  }
  Error LaunchBytes(const LaunchPlan& plan, const void* params,
                    size_t params_bytes, Stream stream) const;

 private:
  struct Kernel {
    const char* entry;
    Function function;
  };

  explicit Launcher(const Context& context) : context_(context) {}

  const Context& context_;
  ModuleHandle module_ = nullptr;
  std::vector<Kernel> kernels_;  // by name
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_LAUNCHER_H_
