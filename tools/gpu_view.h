#ifndef LARDER_TOOLS_GPU_VIEW_H_
#define LARDER_TOOLS_GPU_VIEW_H_

#include <string>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/cuda/driver.h"

namespace larder {

// What `larder doctor` knows of the CUDA driver and its devices.
struct GpuView {
  std::string why_not;  // there is no driver: a sentence; else empty
  std::string path;
  int version = 0;  // 13000 = CUDA 13.0
  std::vector<kernels::cuda::DeviceInfo> devices;
  // Devices that the driver counts and says nothing of: why.
  std::vector<std::string> problems;
};

// Opens the driver and asks; makes no context, takes no device memory.
GpuView LookAtGpus(const kernels::cuda::DriverOptions& options = {});

}  // namespace larder

#endif  // LARDER_TOOLS_GPU_VIEW_H_
