#include "tools/gpu_view.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace larder {

namespace cuda = kernels::cuda;

GpuView LookAtGpus(const cuda::DriverOptions& options) {
  GpuView view;
  const auto driver = cuda::Driver::Open(options, &view.why_not);
  if (driver == nullptr) return view;
  view.path = driver->path();
  view.version = driver->version();
  for (int ordinal = 0; ordinal < driver->device_count(); ++ordinal) {
    cuda::DeviceInfo info;
    if (const cuda::Error error = GetDeviceInfo(*driver, ordinal, &info)) {
      view.problems.push_back(
          absl::StrCat("device ", ordinal, ": ", error.ToString()));
    } else {
      view.devices.push_back(std::move(info));
    }
  }
  return view;
}

}  // namespace larder
