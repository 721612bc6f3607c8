#ifndef LARDER_TIERS_NVME_LOCATION_TABLE_H_
#define LARDER_TIERS_NVME_LOCATION_TABLE_H_

#include <cstdint>
#include <vector>

#include "store/units.h"

namespace larder {

// Where a record lies in the log. 16 bytes, one per extent.
struct Location {
  enum class State : uint8_t {
    kFree = 0,
    kReserved,  // allocated, nothing written
    kWriting,
    kLive,
    kLost,       // found corrupt or failed to be written; Free is all it takes
    kCancelled,  // freed while being written
  };
  uint32_t file = 0;
  uint32_t page = 0;   // of the frame
  uint32_t pages = 0;  // of the record, without its frame
  uint32_t generation : 24 = 0;
  State state : 8 = State::kFree;
};
static_assert(sizeof(Location) == 16);

// Stable handles for records that move. A handle is an index and a generation,
// so that a stale one is recognised. Not thread-safe.
class LocationTable {
 public:
  // The handle of a location; never 0.
  uint64_t HandleOf(uint32_t index) const {
    return uint64_t{entries_[index].generation} << 32 | (uint64_t{index} + 1);
  }

  uint32_t Add(Location location) {
    if (free_.empty()) {
      entries_.push_back(location);
      return static_cast<uint32_t>(entries_.size() - 1);
    }
    const uint32_t index = free_.back();
    free_.pop_back();
    location.generation = entries_[index].generation;
    entries_[index] = location;
    return index;
  }

  void Remove(uint32_t index) {
    Location& location = entries_[index];
    location.state = Location::State::kFree;
    location.generation = location.generation + 1;
    free_.push_back(index);
  }

  // The index, or nullptr for a handle that names nothing (any more).
  Location* Find(uint64_t handle) {
    const uint64_t index = (handle & 0xffffffff) - 1;
    if (index >= entries_.size() ||
        entries_[index].state == Location::State::kFree ||
        entries_[index].generation != handle >> 32) {
      return nullptr;
    }
    return &entries_[index];
  }

  uint32_t IndexOf(const Location* location) const {
    return static_cast<uint32_t>(location - entries_.data());
  }
  Location& operator[](uint32_t index) { return entries_[index]; }
  size_t size() const { return entries_.size(); }

 private:
  std::vector<Location> entries_;
  std::vector<uint32_t> free_;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_LOCATION_TABLE_H_
