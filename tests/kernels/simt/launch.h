#ifndef LARDER_TESTS_KERNELS_SIMT_LAUNCH_H_
#define LARDER_TESTS_KERNELS_SIMT_LAUNCH_H_

// What tests of kernels launch with.

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/launch_plan.h"
#include "tests/kernels/simt/simt.h"

namespace simt {

// As the plan says; `suffix` names the object whose kernels are meant.
template <typename Params>
std::optional<std::string> Launch(const larder::kernels::cuda::LaunchPlan& plan,
                                  const Params& params,
                                  const Schedule& schedule = {},
                                  const std::string& suffix = "") {
  if (plan.entry == nullptr) return "there is nothing to launch";
  const Kernel* const kernel = FindKernel(plan.entry + suffix);
  if (kernel == nullptr)
    return plan.entry + suffix + ": there is no such kernel";
  return Launch(*kernel, {plan.grid[0], plan.grid[1], plan.grid[2]},
                {plan.block_threads, 1, 1}, plan.shared_bytes, &params,
                sizeof params, schedule);
}

// Under ThreadSanitizer every thread is a new fiber of its own: tests are
// smaller there.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define LARDER_SIMT_SMALL
#endif
#endif
#ifdef LARDER_SIMT_SMALL
inline constexpr bool kSmall = true;
#else
inline constexpr bool kSmall = false;
#endif

// The fixed schedule and some random ones.
inline std::vector<Schedule> SomeSchedules(uint64_t random = kSmall ? 1 : 3) {
  std::vector<Schedule> schedules = {{}};
  for (uint64_t seed = 1; seed <= random; ++seed) {
    schedules.push_back({true, seed});
  }
  return schedules;
}

// Where every DeviceArray is, for an executor that checks bounds by itself: the
// PTX interpreter, which these tests are also built with (tests/kernels/ptx).
// Thread-safe.
class DeviceMemory {
 public:
  static DeviceMemory& Get() {
    static DeviceMemory memory;
    return memory;
  }
  void Add(void* at, size_t bytes) {
    const std::lock_guard lock(mutex_);
    arrays_[at] = bytes;
  }
  void Remove(void* at) {
    const std::lock_guard lock(mutex_);
    arrays_.erase(at);
  }
  std::map<void*, size_t> Arrays() const {
    const std::lock_guard lock(mutex_);
    return arrays_;
  }

 private:
  mutable std::mutex mutex_;
  std::map<void*, size_t> arrays_;
};

// Where arrays come from: the heap, so that AddressSanitizer sees both ends, or
// on a device what both reach (tests/kernels/gpu).
#ifdef LARDER_TESTS_ON_GPU
void* AllocateDevice(size_t bytes);
void FreeDevice(void* at);
#else
inline void* AllocateDevice(size_t bytes) {
  void* at = nullptr;
  if (posix_memalign(&at, 256, bytes + (bytes == 0)) != 0) abort();
  return at;
}
inline void FreeDevice(void* at) {
  free(at);
}
#endif

// What stands for device memory: exact sizes, 256-byte aligned as a device
// gives it.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count, uint8_t fill = 0xee) : count_(count) {
    void* const at = AllocateDevice(count * sizeof(T));
    data_.reset(static_cast<T*>(at));
    DeviceMemory::Get().Add(at, count * sizeof(T));
    Fill(fill);
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
    if (!from.empty()) memcpy(data(), from.data(), count_ * sizeof(T));
  }
  void Fill(uint8_t byte) { memset(data_.get(), byte, count_ * sizeof(T)); }
  T* data() const { return data_.get(); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_.get()[i]; }
  std::vector<T> Copy() const { return {data(), data() + count_}; }

 private:
  struct Free {
    void operator()(void* at) const {
      DeviceMemory::Get().Remove(at);
      FreeDevice(at);
    }
  };
  size_t count_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace simt

#endif  // LARDER_TESTS_KERNELS_SIMT_LAUNCH_H_
