// The launches of tests/kernels/simt, carried out by a real device: the
// executor's tests, linked with this in place of the executor and its kernels,
// run the code that ships. LARDER_CUDA_FAMILY names the .cu file. Arrays lie in
// page-locked host memory, which device and host have at the same address.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "kernels/cuda/context.h"
#include "kernels/cuda/image.h"
#include "kernels/cuda/launcher.h"
#include "tests/kernels/simt/launch.h"

namespace simt {
namespace {

namespace cuda = larder::kernels::cuda;

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "tests/kernels/gpu: %s\n", why.c_str());
  std::abort();
}
void Check(const cuda::Error& error) {
  if (error) Die(error.ToString());
}

// Never destroyed: the driver may be gone before the last destructors run.
class Gpu {
 public:
  static Gpu& Get() {
    static Gpu& gpu = *new Gpu;
    return gpu;
  }

  // From one arena: page-locking takes milliseconds. What is free is used again
  // once all is.
  void* Allocate(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const size_t at = (used_ + 255) / 256 * 256;
    if (at + bytes > kArenaBytes) Die("the arena is too small");
    used_ = at + bytes;
    ++live_;
    return arena_ + at;
  }
  void Free(void* at) {
    const std::lock_guard lock(mutex_);
    if (--live_ == 0) used_ = 0;
  }

  const Kernel* Find(std::string_view name) {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[std::string(name)];
    if (entry.launcher == nullptr) {
      entry.name = std::string(name);
      cuda::Error error;
      entry.launcher = cuda::Launcher::Load(*context_, image_.data,
                                            {entry.name.c_str()}, &error);
      if (entry.launcher == nullptr) return nullptr;
      entry.kernel = {entry.name.c_str(), nullptr, 0, 1024};
    }
    return &entry.kernel;
  }

  std::optional<std::string> Run(const Kernel& kernel, Dim3 grid, Dim3 block,
                                 size_t shared_bytes, const void* params,
                                 size_t params_bytes) {
    const std::lock_guard lock(mutex_);
    const cuda::Context::Scope scope(*context_);
    cuda::LaunchPlan plan;
    plan.entry = kernel.name;
    plan.grid[0] = grid.x;
    plan.grid[1] = grid.y;
    plan.grid[2] = grid.z;
    plan.block_threads = block.x;
    plan.shared_bytes = static_cast<uint32_t>(shared_bytes);
    cuda::Error error = entries_[kernel.name].launcher->LaunchBytes(
        plan, params, params_bytes, nullptr);
    if (!error) error = driver_->stream_synchronize(nullptr);
    if (!error) return std::nullopt;
    return error.ToString();
  }

 private:
  static constexpr size_t kArenaBytes = size_t{1} << 30;

  struct Entry {
    std::string name;
    std::unique_ptr<cuda::Launcher> launcher;
    Kernel kernel;
  };

  Gpu() {
    const char* const family = getenv("LARDER_CUDA_FAMILY");
    if (family == nullptr) Die("LARDER_CUDA_FAMILY is not set");
    image_ = cuda::FindImage(family);
    if (image_.data == nullptr) Die("there is no code of that family");
    std::string why_not;
    driver_ = cuda::Driver::Open({}, &why_not);
    if (driver_ == nullptr) Die(why_not);
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error);
    Check(error);
    const cuda::Context::Scope scope(*context_);
    void* memory = nullptr;
    Check(driver_->mem_host_alloc(
        &memory, kArenaBytes,
        cuda::kHostAllocPortable | cuda::kHostAllocDeviceMap));
    cuda::DevicePtr address = 0;
    Check(driver_->mem_host_get_device_pointer(&address, memory, 0));
    if (address != reinterpret_cast<uintptr_t>(memory)) {
      Die("the device has host memory at other addresses");
    }
    arena_ = static_cast<char*>(memory);
    std::printf("on %s\n", context_->info().name.c_str());
  }

  cuda::Image image_ = {};
  std::unique_ptr<const cuda::Driver> driver_;
  std::unique_ptr<cuda::Context> context_;
  char* arena_ = nullptr;
  std::mutex mutex_;
  size_t used_ = 0;
  size_t live_ = 0;
  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace

void* AllocateDevice(size_t bytes) {
  return Gpu::Get().Allocate(bytes);
}
void FreeDevice(void* at) {
  Gpu::Get().Free(at);
}

const Kernel* FindKernel(std::string_view name) {
  return Gpu::Get().Find(name);
}

std::optional<std::string> Launch(const Kernel& kernel, Dim3 grid, Dim3 block,
                                  size_t shared_bytes, const void* params,
                                  size_t params_bytes,
                                  const Schedule& schedule) {
  return Gpu::Get().Run(kernel, grid, block, shared_bytes, params,
                        params_bytes);
}

}  // namespace simt
