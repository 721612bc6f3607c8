#ifndef LARDER_STORE_REMEMBERED_MISSES_H_
#define LARDER_STORE_REMEMBERED_MISSES_H_

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"

#include "store/space_table.h"
#include "store/types.h"

namespace larder {

// Why chunks that are gone went: the last `capacity` of them, by a 64-bit
// fingerprint (this explains misses, nothing is decided by it). Not
// thread-safe.
class RememberedMisses {
 public:
  explicit RememberedMisses(size_t capacity) : ring_(capacity) {}

  void Add(SpaceRef space, const ChunkId& id, MissReason reason) {
    if (ring_.empty()) return;
    const uint64_t key = Key(space, id);
    uint64_t& place = ring_[next_];
    if (const auto old = why_.find(place);
        old != why_.end() && old->second.place == next_) {
      why_.erase(old);
    }
    place = key;
    why_[key] = Why{static_cast<uint32_t>(next_), reason};
    next_ = (next_ + 1) % ring_.size();
  }

  // kNeverSeen if it is not remembered.
  MissReason Find(SpaceRef space, const ChunkId& id) const {
    const auto it = why_.find(Key(space, id));
    return it == why_.end() ? MissReason::kNeverSeen : it->second.reason;
  }

  uint64_t MemoryBytes() const {
    return ring_.capacity() * sizeof(ring_[0]) +
           why_.capacity() * (sizeof(*why_.begin()) + 1);
  }

 private:
  struct Why {
    uint32_t place = 0;  // where in the ring its newest entry is
    MissReason reason{};
  };

  static uint64_t Key(SpaceRef space, const ChunkId& id) {
    return absl::HashOf(Raw(space), id.bytes);
  }

  std::vector<uint64_t> ring_;
  absl::flat_hash_map<uint64_t, Why> why_;
  size_t next_ = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_REMEMBERED_MISSES_H_
