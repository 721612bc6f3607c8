#include "kernels/cuda/launcher.h"

#include <algorithm>

namespace larder::kernels::cuda {

std::unique_ptr<Launcher> Launcher::Load(
    const Context& context, const void* image,
    const std::vector<const char*>& entries, Error* error) {
  const Driver& driver = context.driver();
  const Context::Scope scope(context);
  *error = scope.error();
  if (*error) return nullptr;
  std::unique_ptr<Launcher> launcher(new Launcher(context));
  *error = driver.module_load_data(&launcher->module_, image);
  if (*error) return nullptr;
  for (const char* const entry : entries) {
    Function function = nullptr;
    *error = driver.module_get_function(&function, launcher->module_, entry);
    if (*error) return nullptr;
    int static_bytes = 0;
    *error = driver.func_get_attribute(
        &static_bytes, FunctionAttribute::kSharedSizeBytes, function);
    if (*error) return nullptr;
    const int room =
        static_cast<int>(context.info().shared_bytes_max) - static_bytes;
    *error = driver.func_set_attribute(
        function, FunctionAttribute::kMaxDynamicSharedSizeBytes,
        std::max(room, 0));
    if (*error) return nullptr;
    launcher->kernels_.push_back({entry, function});
  }
  std::sort(launcher->kernels_.begin(), launcher->kernels_.end(),
            [](const Kernel& a, const Kernel& b) {
              return std::strcmp(a.entry, b.entry) < 0;
            });
  return launcher;
}

Launcher::~Launcher() {
  if (module_ == nullptr) return;
  const Context::Scope scope(context_);
  if (!scope.error()) (void)context_.driver().module_unload(module_);
}

Error Launcher::LaunchBytes(const LaunchPlan& plan, const void* params,
                            size_t params_bytes, Stream stream) const {
  if (plan.entry == nullptr) return {};
  const auto kernel =
      std::lower_bound(kernels_.begin(), kernels_.end(), plan.entry,
                       [](const Kernel& k, const char* entry) {
                         return std::strcmp(k.entry, entry) < 0;
                       });
  if (kernel == kernels_.end() || std::strcmp(kernel->entry, plan.entry) != 0) {
    return {Result::kNotFound, "Launcher::Launch", "CUDA_ERROR_NOT_FOUND",
            "no kernel of that name was loaded"};
  }
  size_t bytes = params_bytes;
  void* extra[] = {kLaunchParamBufferPointer, const_cast<void*>(params),
                   kLaunchParamBufferSize, &bytes, kLaunchParamEnd};
  return context_.driver().launch_kernel(
      kernel->function, plan.grid[0], plan.grid[1], plan.grid[2],
      plan.block_threads, 1, 1, plan.shared_bytes, stream, nullptr, extra);
}

}  // namespace larder::kernels::cuda
