#include "tests/standin/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

namespace larder::standin {
namespace {

constexpr char kMemoryName[] = "larder-standin";

uint64_t PagesUp(uint64_t bytes) {
  return (bytes + kHostPageBytes - 1) / kHostPageBytes * kHostPageBytes;
}

void* At(uint64_t address) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

// Back to addresses with nothing behind them.
void Vacate(uint64_t address, uint64_t bytes) {
  (void)mmap(At(address), bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

// Whether this process may write all of a range; false for what is not mapped.
bool HostWritable(uintptr_t address, uint64_t bytes) {
  std::ifstream maps("/proc/self/maps");
  uintptr_t next = address;
  for (std::string line; std::getline(maps, line);) {
    unsigned long begin = 0;
    unsigned long end = 0;
    char rights[5] = {};
    if (std::sscanf(line.c_str(), "%lx-%lx %4s", &begin, &end, rights) != 3) {
      continue;
    }
    if (end <= next) continue;
    if (begin > next || rights[1] != 'w') return false;
    next = end;
    if (next >= address + bytes) return true;
  }
  return false;
}

}  // namespace

std::shared_ptr<Physical> Physical::Make(uint64_t bytes, bool exportable,
                                         uint64_t* used_bytes,
                                         uint64_t capacity_bytes) {
  const uint64_t rounded = PagesUp(bytes);
  if (rounded > capacity_bytes || *used_bytes > capacity_bytes - rounded) {
    return nullptr;
  }
  const int fd = memfd_create(kMemoryName, MFD_CLOEXEC);
  if (fd < 0) return nullptr;
  void* memory = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(rounded)) == 0) {
    memory = mmap(nullptr, rounded, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (memory == MAP_FAILED) {
    close(fd);
    return nullptr;
  }
  std::memset(memory, 0xcb, rounded);
  munmap(memory, rounded);
  std::shared_ptr<Physical> physical(new Physical);
  physical->fd_ = fd;
  physical->bytes_ = rounded;
  physical->exportable_ = exportable;
  physical->used_bytes_ = used_bytes;
  *used_bytes += rounded;
  return physical;
}

std::shared_ptr<Physical> Physical::Import(int fd) {
  struct stat info;
  char target[128] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  if (fstat(fd, &info) != 0 || info.st_size <= 0 ||
      readlink(link.c_str(), target, sizeof target - 1) < 0 ||
      std::strstr(target, kMemoryName) == nullptr) {
    close(fd);
    return nullptr;
  }
  std::shared_ptr<Physical> physical(new Physical);
  physical->fd_ = fd;
  physical->bytes_ = static_cast<uint64_t>(info.st_size);
  physical->exportable_ = true;
  return physical;
}

Physical::~Physical() {
  if (fd_ >= 0) close(fd_);
  if (used_bytes_ != nullptr) *used_bytes_ -= bytes_;
}

DevicePtr AddressSpace::Attach(std::shared_ptr<Physical> physical,
                               uint64_t bytes, Kind kind) {
  const uint64_t span = physical->bytes();
  // A page of nothing behind each, so that what runs over its end faults.
  void* const address =
      mmap(nullptr, span + kHostPageBytes, PROT_NONE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return 0;
  if (mmap(address, span, open_ > 0 ? PROT_READ | PROT_WRITE : PROT_NONE,
           MAP_SHARED | MAP_FIXED, physical->fd(), 0) == MAP_FAILED) {
    munmap(address, span + kHostPageBytes);
    return 0;
  }
  const auto at = static_cast<DevicePtr>(reinterpret_cast<uintptr_t>(address));
  mappings_[at] = {bytes, span, std::move(physical), kind, true, true};
  return at;
}

bool AddressSpace::Detach(DevicePtr address, Kind kind) {
  const auto it = mappings_.find(address);
  if (it == mappings_.end() || it->second.kind != kind) return false;
  munmap(At(address), it->second.span_bytes + kHostPageBytes);
  mappings_.erase(it);
  return true;
}

DevicePtr AddressSpace::Reserve(uint64_t bytes, uint64_t alignment) {
  if (alignment < kGranularityBytes) alignment = kGranularityBytes;
  void* const found = mmap(nullptr, bytes + alignment, PROT_NONE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return 0;
  const auto begin = reinterpret_cast<uintptr_t>(found);
  const uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  if (aligned > begin) munmap(found, aligned - begin);
  const uintptr_t end = begin + bytes + alignment;
  if (end > aligned + bytes) {
    munmap(At(aligned + bytes), end - aligned - bytes);
  }
  reservations_[aligned] = bytes;
  return aligned;
}

bool AddressSpace::FreeReservation(DevicePtr address, uint64_t bytes) {
  const auto it = reservations_.find(address);
  if (it == reservations_.end() || it->second != bytes) return false;
  const auto mapping = mappings_.lower_bound(address);
  if (mapping != mappings_.end() && mapping->first < address + bytes) {
    return false;
  }
  munmap(At(address), bytes);
  reservations_.erase(it);
  return true;
}

bool AddressSpace::Map(DevicePtr address, uint64_t bytes,
                       std::shared_ptr<Physical> physical) {
  if (bytes == 0 || address % kGranularityBytes != 0 ||
      bytes != physical->bytes()) {
    return false;
  }
  auto reserved = reservations_.upper_bound(address);
  if (reserved == reservations_.begin()) return false;
  --reserved;
  if (address + bytes > reserved->first + reserved->second) return false;
  const auto next = mappings_.lower_bound(address);
  if (next != mappings_.end() && next->first < address + bytes) return false;
  if (next != mappings_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.span_bytes > address) return false;
  }
  if (mmap(At(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
           physical->fd(), 0) == MAP_FAILED) {
    return false;
  }
  mappings_[address] = {bytes,         bytes, std::move(physical),
                        Kind::kMapped, false, false};
  return true;
}

bool AddressSpace::Unmap(DevicePtr address, uint64_t bytes) {
  uint64_t next = address;
  auto it = mappings_.find(address);
  for (; it != mappings_.end() && next < address + bytes; ++it) {
    if (it->first != next || it->second.kind != Kind::kMapped) return false;
    next += it->second.span_bytes;
  }
  if (next != address + bytes || bytes == 0) return false;
  mappings_.erase(mappings_.find(address), it);
  Vacate(address, bytes);
  return true;
}

bool AddressSpace::SetAccess(DevicePtr address, uint64_t bytes, bool read,
                             bool write) {
  uint64_t next = address;
  auto it = mappings_.find(address);
  const auto first = it;
  for (; it != mappings_.end() && next < address + bytes; ++it) {
    if (it->first != next || it->second.kind != Kind::kMapped) return false;
    next += it->second.span_bytes;
  }
  if (next != address + bytes || bytes == 0) return false;
  for (auto changed = first; changed != it; ++changed) {
    changed->second.read = read;
    changed->second.write = write;
  }
  if (open_ > 0) Protect(true);
  return true;
}

bool AddressSpace::Allows(DevicePtr address, uint64_t bytes, bool write) const {
  uint64_t next = address;
  while (next < address + bytes) {
    auto it = mappings_.upper_bound(next);
    if (it == mappings_.begin()) return false;
    --it;
    const uint64_t end = it->first + it->second.bytes;
    if (next >= end) return false;
    if (!it->second.read || (write && !it->second.write)) return false;
    next = end;
  }
  return true;
}

std::shared_ptr<Physical> AddressSpace::AllocationAt(DevicePtr address,
                                                     uint64_t* bytes) const {
  const auto it = mappings_.find(address);
  if (it == mappings_.end() || it->second.kind != Kind::kAlloc) return nullptr;
  *bytes = it->second.bytes;
  return it->second.physical;
}

void AddressSpace::Clear() {
  for (const auto& [address, mapping] : mappings_) {
    if (mapping.kind == Kind::kMapped) continue;
    munmap(At(address), mapping.span_bytes + kHostPageBytes);
  }
  for (const auto& [address, bytes] : reservations_) munmap(At(address), bytes);
  mappings_.clear();
  reservations_.clear();
}

size_t AddressSpace::mappings() const {
  size_t count = 0;
  for (const auto& [address, mapping] : mappings_) {
    count += mapping.kind == Kind::kMapped ? 1 : 0;
  }
  return count;
}

size_t AddressSpace::allocations() const {
  return mappings_.size() - mappings();
}

void AddressSpace::Protect(bool open) {
  for (const auto& [address, mapping] : mappings_) {
    int rights = PROT_NONE;
    if (open && mapping.read) rights |= PROT_READ;
    if (open && mapping.write) rights |= PROT_WRITE;
    (void)mprotect(At(address), mapping.span_bytes, rights);
  }
}

OpenMemory::OpenMemory(AddressSpace& space) : space_(space) {
  if (space_.open_++ == 0) space_.Protect(true);
}

OpenMemory::~OpenMemory() {
  if (--space_.open_ == 0) space_.Protect(false);
}

Result PinnedMemory::Register(void* memory, uint64_t bytes, bool read_only) {
  if (memory == nullptr || bytes == 0) return Result::kInvalidValue;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const auto next = ranges_.lower_bound(begin);
  if (next != ranges_.end() && next->first < begin + bytes) {
    return Result::kHostMemoryAlreadyRegistered;
  }
  if (next != ranges_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes > begin) {
      return Result::kHostMemoryAlreadyRegistered;
    }
  }
  // The driver pins for writing unless it is told otherwise.
  if (!read_only && !HostWritable(begin, bytes)) return Result::kInvalidValue;
  ranges_[begin] = {bytes, read_only, false};
  return Result::kSuccess;
}

Result PinnedMemory::Unregister(void* memory) {
  const auto it = ranges_.find(reinterpret_cast<uintptr_t>(memory));
  if (it == ranges_.end() || it->second.allocated) {
    return Result::kHostMemoryNotRegistered;
  }
  ranges_.erase(it);
  return Result::kSuccess;
}

void* PinnedMemory::Alloc(uint64_t bytes) {
  void* const memory = mmap(nullptr, PagesUp(bytes), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  std::memset(memory, 0xcb, bytes);
  ranges_[reinterpret_cast<uintptr_t>(memory)] = {bytes, false, true};
  return memory;
}

Result PinnedMemory::Free(void* memory) {
  const auto it = ranges_.find(reinterpret_cast<uintptr_t>(memory));
  if (it == ranges_.end() || !it->second.allocated) {
    return Result::kInvalidValue;
  }
  munmap(memory, PagesUp(it->second.bytes));
  ranges_.erase(it);
  return Result::kSuccess;
}

PinnedMemory::Reach PinnedMemory::Find(const void* memory,
                                       uint64_t bytes) const {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  auto it = ranges_.upper_bound(begin);
  const bool reaches_next = it != ranges_.end() && it->first < begin + bytes;
  if (it != ranges_.begin()) {
    const auto before = std::prev(it);
    const uintptr_t end = before->first + before->second.bytes;
    if (begin < end) {
      if (begin + bytes > end) return Reach::kPartly;
      return before->second.read_only ? Reach::kReadOnly : Reach::kPinned;
    }
  }
  return reaches_next ? Reach::kPartly : Reach::kPageable;
}

void PinnedMemory::Clear() {
  for (const auto& [address, range] : ranges_) {
    if (range.allocated) munmap(At(address), PagesUp(range.bytes));
  }
  ranges_.clear();
}

size_t PinnedMemory::allocations() const {
  size_t count = 0;
  for (const auto& [address, range] : ranges_) count += range.allocated ? 1 : 0;
  return count;
}

size_t PinnedMemory::registrations() const {
  return ranges_.size() - allocations();
}

}  // namespace larder::standin
