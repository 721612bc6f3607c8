#include "kernels/cuda/driver.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <utility>

namespace larder::kernels::cuda {
namespace {

// Since CUDA 12.0; the versions that came before cannot be used.
using GetProcAddress = Result (*)(const char* symbol, void** address,
                                  int version, uint64_t flags, int* status);
constexpr uint64_t kLegacyStream = 1;

std::string VersionText(int version) {
  return std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10);
}

bool Fail(std::string* why_not, std::string sentence) {
  if (why_not != nullptr) *why_not = std::move(sentence);
  return false;
}

}  // namespace

std::string Error::ToString() const {
  if (code == Result::kSuccess) return "OK";
  return std::string(call) + ": " + text + " (" + name + ", " +
         std::to_string(static_cast<int>(code)) + ")";
}

bool LosesContext(Result code) {
  switch (code) {
    case Result::kDeinitialized:
    case Result::kDeviceUnavailable:
    case Result::kEccUncorrectable:
    case Result::kIllegalAddress:
    case Result::kHardwareStackError:
    case Result::kIllegalInstruction:
    case Result::kMisalignedAddress:
    case Result::kInvalidAddressSpace:
    case Result::kInvalidPc:
    case Result::kLaunchFailed:
    case Result::kUnknown:
      return true;
    default:
      return false;
  }
}

EntryPoint::EntryPoint(Driver* driver, const char* name, int version,
                       const char* symbol)
    : driver_(driver), name_(name), version_(version), symbol_(symbol) {
  driver->entry_points_.push_back(this);
}

Error EntryPoint::Explain(Result code) const {
  return driver_->Explain(code, name_);
}

Error Driver::Explain(Result code, const char* call) const {
  // Called directly: what explains errors must not be explained.
  using Text = Result (*)(Result, const char**);
  Error error{code, call, "unknown code", "no text"};
  const char* text = nullptr;
  if (reinterpret_cast<Text>(get_error_name_.address_)(code, &text) ==
          Result::kSuccess &&
      text != nullptr) {
    error.name = text;
  }
  text = nullptr;
  if (reinterpret_cast<Text>(get_error_string_.address_)(code, &text) ==
          Result::kSuccess &&
      text != nullptr) {
    error.text = text;
  }
  return error;
}

bool Driver::Load(void* library, std::string* why_not) {
  const auto find =
      reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  for (EntryPoint* const entry : entry_points_) {
    void* address = nullptr;
    if (find != nullptr) {
      int status = 0;
      if (find(entry->name_, &address, entry->version_, kLegacyStream,
               &status) != Result::kSuccess) {
        address = nullptr;
      }
    }
    if (address == nullptr) address = dlsym(library, entry->symbol_);
    if (address == nullptr) {
      return Fail(why_not, path_ + " has no " + entry->name_ + " of CUDA " +
                               VersionText(entry->version_) +
                               "; install a driver of CUDA " +
                               VersionText(kVersionMin) + " or newer");
    }
    entry->address_ = address;
  }
  return true;
}

bool Driver::Start(std::string* why_not) {
  if (const Error error = driver_get_version_(&version_)) {
    return Fail(why_not, path_ + ": " + error.ToString());
  }
  if (version_ < kVersionMin) {
    return Fail(why_not, path_ + " is a driver of CUDA " +
                             VersionText(version_) + "; install one of CUDA " +
                             VersionText(kVersionMin) + " or newer");
  }
  const Error error = init_(0);
  if (error.code == Result::kNoDevice) {
    return Fail(why_not, "the driver " + path_ +
                             " finds no device; see nvidia-smi, "
                             "CUDA_VISIBLE_DEVICES and, in a container, that "
                             "the device was passed to it");
  }
  if (error.code == Result::kSystemDriverMismatch) {
    return Fail(why_not, "the driver " + path_ +
                             " and the kernel's module differ in version; "
                             "restart the machine, or reload the module");
  }
  if (error) {
    return Fail(why_not,
                path_ + ": " + error.ToString() + "; see nvidia-smi and dmesg");
  }
  if (const Error count = device_get_count_(&device_count_)) {
    return Fail(why_not, path_ + ": " + count.ToString());
  }
  if (device_count_ == 0) {
    return Fail(why_not, "the driver " + path_ +
                             " finds no device; see CUDA_VISIBLE_DEVICES");
  }
  return true;
}

std::unique_ptr<const Driver> Driver::Open(const DriverOptions& options,
                                           std::string* why_not) {
  std::unique_ptr<Driver> driver(new Driver);
  driver->path_ = options.path;
  if (driver->path_.empty()) {
    // The one place where it is read.
    const char* const path = secure_getenv("LARDER_CUDA_DRIVER");
    driver->path_ = path != nullptr && *path != 0 ? path : "libcuda.so.1";
  }
  void* const library = dlopen(driver->path_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const text = dlerror();
    Fail(why_not, "no CUDA driver: " +
                      std::string(text != nullptr ? text : driver->path_) +
                      "; on a machine with an NVIDIA GPU install its driver");
    return nullptr;
  }
  if (!driver->Load(library, why_not) || !driver->Start(why_not)) {
    return nullptr;
  }
  return driver;
}

}  // namespace larder::kernels::cuda
