#ifndef LARDER_KERNELS_CUDA_LAUNCH_PLAN_H_
#define LARDER_KERNELS_CUDA_LAUNCH_PLAN_H_

// What is needed to start a kernel, apart from its parameters. Each kernel's
// header computes one from its parameters, on the host, without asking the
// device anything; whoever has a device (or executes kernels without one)
// carries it out on a stream.

#include <stdint.h>

namespace larder::kernels::cuda {

struct LaunchPlan {
  // The kernel's unmangled name (extern "C"); static storage. Null: there is
  // nothing to do.
  const char* entry = nullptr;
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block_threads = 0;
  uint32_t shared_bytes = 0;  // dynamic shared memory
};

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_LAUNCH_PLAN_H_
