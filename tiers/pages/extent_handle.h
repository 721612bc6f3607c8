#ifndef LARDER_TIERS_PAGES_EXTENT_HANDLE_H_
#define LARDER_TIERS_PAGES_EXTENT_HANDLE_H_

// What tiers made of slabs remember of an extent: in its handle, and in the tag
// of its run of pages (page_allocator.h).

#include <cstdint>

#include "store/units.h"

namespace larder {

// The largest slab that a handle can name pages of: 2^24 pages.
inline constexpr uint64_t kSlabBytesMax = 64_GiB;

// An extent's handle: its slab, its first page there, and a counter that tells
// it from most of those that had the same page before it. Slabs count from 1,
// so that no handle is 0.
struct ExtentHandle {
  uint32_t slab = 0;
  uint8_t generation = 0;
  uint32_t page = 0;  // 24 bits

  uint64_t Encode() const {
    return uint64_t{slab} << 32 | uint64_t{generation} << 24 | page;
  }
  static ExtentHandle Decode(uint64_t handle) {
    return {static_cast<uint32_t>(handle >> 32),
            static_cast<uint8_t>(handle >> 24),
            static_cast<uint32_t>(handle & 0xffffff)};
  }
};

// PageAllocator's tag: the handle's counter, and how much of the last page the
// record does not need (< kPageBytes).
inline uint32_t MakeTag(uint8_t generation, uint64_t bytes) {
  const uint64_t slack = RoundUp(bytes, kPageBytes) - bytes;
  return uint32_t{generation} << 16 | static_cast<uint32_t>(slack);
}
inline uint8_t TagGeneration(uint32_t tag) {
  return static_cast<uint8_t>(tag >> 16);
}
inline uint32_t TagSlack(uint32_t tag) {
  return tag & 0xffff;
}

}  // namespace larder

#endif  // LARDER_TIERS_PAGES_EXTENT_HANDLE_H_
