#include "kernels/cuda/context.h"

#include <cstdio>

namespace larder::kernels::cuda {
namespace {

std::string UuidText(const Uuid& uuid) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x",
                  static_cast<unsigned char>(uuid.bytes[i]));
    text += digits;
  }
  return text;
}

}  // namespace

Error GetDeviceInfo(const Driver& driver, int ordinal, DeviceInfo* info) {
  Device device = 0;
  if (const Error error = driver.device_get(&device, ordinal)) return error;
  DeviceInfo found;
  found.ordinal = ordinal;
  char name[256] = {};
  if (const Error error = driver.device_get_name(name, sizeof name, device)) {
    return error;
  }
  found.name = name;
  Uuid uuid = {};
  if (const Error error = driver.device_get_uuid(&uuid, device)) return error;
  found.uuid = UuidText(uuid);
  size_t bytes = 0;
  if (const Error error = driver.device_total_mem(&bytes, device)) return error;
  found.memory_bytes = bytes;

  Error failed;
  const auto attribute = [&](DeviceAttribute which) {
    int value = 0;
    const Error error = driver.device_get_attribute(&value, which, device);
    if (error && !failed) failed = error;
    return value;
  };
  using A = DeviceAttribute;
  found.compute_major = attribute(A::kComputeCapabilityMajor);
  found.compute_minor = attribute(A::kComputeCapabilityMinor);
  found.multiprocessors = attribute(A::kMultiprocessorCount);
  found.l2_cache_bytes = static_cast<uint64_t>(attribute(A::kL2CacheBytes));
  found.shared_bytes_max =
      static_cast<uint64_t>(attribute(A::kMaxSharedMemoryPerBlockOptin));
  found.integrated = attribute(A::kIntegrated) != 0;
  found.registers_host_memory = attribute(A::kHostRegisterSupported) != 0;
  found.registers_read_only_memory =
      attribute(A::kReadOnlyHostRegisterSupported) != 0;
  found.maps_memory = attribute(A::kVirtualMemoryManagementSupported) != 0;
  found.exports_memory = attribute(A::kPosixFileDescriptorSupported) != 0;
  if (!failed) *info = std::move(found);
  return failed;
}

std::unique_ptr<Context> Context::Retain(const Driver& driver, int ordinal,
                                         Error* error) {
  std::unique_ptr<Context> context(new Context(driver));
  *error = GetDeviceInfo(driver, ordinal, &context->info_);
  if (*error) return nullptr;
  *error = driver.device_get(&context->device_, ordinal);
  if (*error) return nullptr;
  ContextHandle handle = nullptr;
  *error = driver.device_primary_ctx_retain(&handle, context->device_);
  if (*error) return nullptr;
  context->handle_ = handle;
  return context;
}

Context::~Context() {
  // That the device was lost is no news to whoever gives its context up.
  if (handle_ != nullptr) (void)driver_.device_primary_ctx_release(device_);
}

Context::Scope::Scope(const Context& context)
    : driver_(context.driver()),
      error_(driver_.ctx_push_current(context.handle())) {}

Context::Scope::~Scope() {
  if (error_) return;
  ContextHandle popped = nullptr;
  (void)driver_.ctx_pop_current(&popped);
}

}  // namespace larder::kernels::cuda
