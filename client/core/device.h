#ifndef LARDER_CLIENT_CORE_DEVICE_H_
#define LARDER_CLIENT_CORE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "client/core/view.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/launcher.h"
#include "kernels/cuda/paged_copy_types.h"
#include "store/status.h"
#include "store/units.h"
#include "transport/local/channel.h"

namespace larder::client {

// What went wrong in a call of the CUDA driver, as a status: ResourceExhausted
// where memory is short, else Unavailable.
Status ToStatus(const kernels::cuda::Error& error);

// K and V of one layer between the view's planes and a segment at `dense`, for
// tokens whose slots lie at `slots`: what a kernel takes. REQUIRES: the view
// has blocks or slots, of keys and values, and the layer.
kernels::cuda::PagedCopies CopiesOf(const View& view, uint32_t layer,
                                    uint32_t tokens,
                                    kernels::cuda::DevicePtr dense,
                                    kernels::cuda::DevicePtr slots);

// A CUDA device as loads and saves use it: the process's primary context, which
// the engine's framework shares, Larder's kernels, and host memory that both
// sides reach. Thread-safe; never destroyed once opened (the driver may be gone
// before a process's last destructors run).
class Device {
 public:
  // The device of this number, opened when first asked for. Unavailable says
  // what is missing: the driver, the device, or kernels in this build.
  static StatusOr<Device*> Get(int ordinal);

  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const kernels::cuda::Driver& driver() const { return context_->driver(); }
  const kernels::cuda::Context& context() const { return *context_; }
  const kernels::cuda::Launcher& launcher() const { return *launcher_; }
  // Kernels that decode KVC1; null where this build or the device has none.
  const kernels::cuda::Launcher* decoder() const { return decoder_.get(); }

  // Page-locked memory. Unset when default-made.
  class Pinned {
   public:
    Pinned() = default;
    Pinned(Device* device, MutableByteSpan host,
           kernels::cuda::DevicePtr address)
        : device_(device), host_(host), address_(address) {}
    Pinned(Pinned&& other) noexcept { *this = std::move(other); }
    Pinned& operator=(Pinned&& other) noexcept {
      std::swap(device_, other.device_);
      std::swap(host_, other.host_);
      std::swap(address_, other.address_);
      return *this;
    }
    ~Pinned();

    MutableByteSpan host() const { return host_; }
    // Of its first byte, as the device sees it.
    kernels::cuda::DevicePtr address() const { return address_; }

   private:
    Device* device_ = nullptr;
    MutableByteSpan host_;
    kernels::cuda::DevicePtr address_ = 0;
  };
  // At least so many bytes. What is given back is kept for the next that is
  // content with it: page-locking takes milliseconds.
  StatusOr<Pinned> TakePinned(uint64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  // Memory of the device, of any content. Unset when default-made.
  class Memory {
   public:
    Memory() = default;
    Memory(Device* device, kernels::cuda::DevicePtr address, uint64_t bytes)
        : device_(device), address_(address), bytes_(bytes) {}
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
      std::swap(device_, other.device_);
      std::swap(address_, other.address_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Memory();

    kernels::cuda::DevicePtr address() const { return address_; }
    uint64_t bytes() const { return bytes_; }

   private:
    Device* device_ = nullptr;
    kernels::cuda::DevicePtr address_ = 0;
    uint64_t bytes_ = 0;
  };
  // Likewise, and kept likewise: giving memory back waits for the device.
  StatusOr<Memory> TakeMemory(uint64_t bytes) ABSL_LOCKS_EXCLUDED(mu_);

  // Page-locks memory of the caller's while the result lives, which must end
  // before the memory does.
  class Registration {
   public:
    Registration(Device* device, MutableByteSpan memory,
                 kernels::cuda::DevicePtr address)
        : device_(device), memory_(memory), address_(address) {}
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;
    ~Registration();
    kernels::cuda::DevicePtr address() const { return address_; }

   private:
    Device* const device_;
    const MutableByteSpan memory_;
    const kernels::cuda::DevicePtr address_;
  };
  StatusOr<std::unique_ptr<Registration>> Register(MutableByteSpan memory);

  // Where the device sees a slab, which it may only read: page-locked when
  // first asked for, until it is unmapped. nullopt where the driver does not
  // page-lock what this process may not write (larder doctor says so), or could
  // not. Whoever uses the address keeps the mapping meanwhile.
  std::optional<kernels::cuda::DevicePtr> AddressOf(const SlabMapping& slab)
      ABSL_LOCKS_EXCLUDED(slabs_mu_);

 private:
  Device() = default;
  static StatusOr<Device*> Open(int ordinal);

  std::unique_ptr<const kernels::cuda::Driver> driver_;
  std::unique_ptr<kernels::cuda::Context> context_;
  std::unique_ptr<kernels::cuda::Launcher> launcher_;
  std::unique_ptr<kernels::cuda::Launcher> decoder_;
  bool reads_slabs_ = false;

  // What waits for its next use.
  struct Idle {
    std::byte* host = nullptr;  // null: memory of the device
    kernels::cuda::DevicePtr address = 0;
    uint64_t bytes = 0;
  };
  using IdleList = std::vector<Idle>;
  // Nothing: none fits.
  static std::optional<Idle> Reuse(IdleList& list, uint64_t bytes);
  // False: there is enough of it.
  static bool Keep(IdleList& list, const Idle& idle);

  // Held while the driver page-locks, which takes milliseconds.
  absl::Mutex slabs_mu_;
  // 0: it could not.
  absl::flat_hash_map<const SlabMapping*, kernels::cuda::DevicePtr> slabs_
      ABSL_GUARDED_BY(slabs_mu_);

  absl::Mutex mu_;
  IdleList idle_pinned_ ABSL_GUARDED_BY(mu_);
  IdleList idle_memory_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_DEVICE_H_
