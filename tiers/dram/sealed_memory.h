#ifndef LARDER_TIERS_DRAM_SEALED_MEMORY_H_
#define LARDER_TIERS_DRAM_SEALED_MEMORY_H_

#include <cstdint>
#include <memory>

#include "store/status.h"
#include "store/units.h"

namespace larder {

// The grain of sealed memory: a huge page of x86.
inline constexpr uint64_t kHugePageBytes = 2_MiB;

enum class HugePages {
  kAuto,     // where vm.nr_hugepages has enough of them, else ordinary pages
  kOff,      // ordinary pages
  kRequire,  // or not at all
};

struct SealedMemoryOptions {
  uint64_t bytes = 0;  // a multiple of kHugePageBytes
  HugePages huge_pages = HugePages::kAuto;
  int numa_node = -1;  // -1 = any
};

// A memfd, faulted in, that this process alone can write, through the one
// mapping it made before it sealed the file (SHRINK, GROW, FUTURE_WRITE, SEAL).
// Whoever receives the descriptor can map it to read and can neither write,
// resize nor punch it. Stays out of core dumps and of forked children.
class SealedMemory {
 public:
  // ResourceExhausted if there is no memory (or, required, no huge pages) for
  // it; Unavailable if this kernel cannot seal.
  static StatusOr<std::unique_ptr<SealedMemory>> Create(
      const SealedMemoryOptions& options);
  ~SealedMemory();
  SealedMemory(const SealedMemory&) = delete;
  SealedMemory& operator=(const SealedMemory&) = delete;

  // Empty after Wipe.
  MutableByteSpan bytes() const { return {data_, size_}; }
  int fd() const { return fd_; }
  bool huge() const { return huge_; }

  // Writes zeroes over everything, so that whoever still maps it reads nothing
  // else, and gives up the only mapping that could write. The descriptor stays.
  void Wipe();

 private:
  SealedMemory(int fd, bool huge) : fd_(fd), huge_(huge) {}
  static StatusOr<std::unique_ptr<SealedMemory>> CreateOf(
      const SealedMemoryOptions& options, bool huge);

  const int fd_;
  const bool huge_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// OK if memory can be asked of that NUMA node (-1 = any); `binds` says whether
// there is more than one node, so that asking makes a difference.
Status CheckNumaNode(int node, bool& binds);

}  // namespace larder

#endif  // LARDER_TIERS_DRAM_SEALED_MEMORY_H_
