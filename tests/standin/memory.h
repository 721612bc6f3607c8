#ifndef LARDER_TESTS_STANDIN_MEMORY_H_
#define LARDER_TESTS_STANDIN_MEMORY_H_

// The stand-in device's memory, and what it knows of the host's.

#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "kernels/cuda/driver_types.h"

namespace larder::standin {

using kernels::cuda::DevicePtr;
using kernels::cuda::Result;

inline constexpr uint64_t kHostPageBytes = 4096;
inline constexpr uint64_t kGranularityBytes = uint64_t{2} << 20;

// Physical memory: a memfd, filled with junk when it is made. What is imported
// from another process does not count as this one's.
class Physical {
 public:
  // Null if the host has none or the device would be over its capacity.
  static std::shared_ptr<Physical> Make(uint64_t bytes, bool exportable,
                                        uint64_t* used_bytes,
                                        uint64_t capacity_bytes);
  // Takes the descriptor. Null if it is not one of Make's.
  static std::shared_ptr<Physical> Import(int fd);
  ~Physical();

  int fd() const { return fd_; }
  uint64_t bytes() const { return bytes_; }
  bool exportable() const { return exportable_; }

 private:
  Physical() = default;
  int fd_ = -1;
  uint64_t bytes_ = 0;
  bool exportable_ = false;
  uint64_t* used_bytes_ = nullptr;
};

// Addresses of the device. They are addresses of this process, too, at which
// nothing can be read or written but while an OpenMemory exists: host code that
// follows a device pointer faults.
class AddressSpace {
 public:
  enum class Kind : uint8_t { kAlloc, kMapped, kIpc };

  // cuMemAlloc and cuIpcOpenMemHandle: an address range with its memory.
  DevicePtr Attach(std::shared_ptr<Physical> physical, uint64_t bytes,
                   Kind kind);
  // cuMemFree and cuIpcCloseMemHandle. False if `address` is not such a range.
  bool Detach(DevicePtr address, Kind kind);

  DevicePtr Reserve(uint64_t bytes, uint64_t alignment);
  bool FreeReservation(DevicePtr address, uint64_t bytes);
  bool Map(DevicePtr address, uint64_t bytes,
           std::shared_ptr<Physical> physical);
  // Whole mappings only, as the driver has it.
  bool Unmap(DevicePtr address, uint64_t bytes);
  bool SetAccess(DevicePtr address, uint64_t bytes, bool read, bool write);

  // Whether every byte of the range is memory that may be accessed so.
  bool Allows(DevicePtr address, uint64_t bytes, bool write) const;
  // The allocation that `address` is the beginning of, for export.
  std::shared_ptr<Physical> AllocationAt(DevicePtr address,
                                         uint64_t* bytes) const;

  // Everything goes, as with a lost context.
  void Clear();

  size_t allocations() const;
  size_t reservations() const { return reservations_.size(); }
  size_t mappings() const;

 private:
  friend class OpenMemory;
  struct Mapping {
    uint64_t bytes = 0;       // asked for
    uint64_t span_bytes = 0;  // whole pages
    std::shared_ptr<Physical> physical;
    Kind kind = Kind::kAlloc;
    bool read = false;
    bool write = false;
  };
  void Protect(bool open);

  std::map<DevicePtr, Mapping> mappings_;
  std::map<DevicePtr, uint64_t> reservations_;
  int open_ = 0;
};

// While one exists, device addresses can be used by this process: for what the
// device does.
class OpenMemory {
 public:
  explicit OpenMemory(AddressSpace& space);
  ~OpenMemory();
  OpenMemory(const OpenMemory&) = delete;
  OpenMemory& operator=(const OpenMemory&) = delete;

 private:
  AddressSpace& space_;
};

// Host memory that the device can reach.
class PinnedMemory {
 public:
  enum class Reach : uint8_t { kPageable, kPinned, kReadOnly, kPartly };

  Result Register(void* memory, uint64_t bytes, bool read_only);
  Result Unregister(void* memory);
  void* Alloc(uint64_t bytes);
  Result Free(void* memory);
  Reach Find(const void* memory, uint64_t bytes) const;
  void Clear();

  size_t registrations() const;
  size_t allocations() const;

 private:
  struct Range {
    uint64_t bytes = 0;
    bool read_only = false;
    bool allocated = false;
  };
  std::map<uintptr_t, Range> ranges_;
};

}  // namespace larder::standin

#endif  // LARDER_TESTS_STANDIN_MEMORY_H_
