#ifndef LARDER_STORE_POLICY_H_
#define LARDER_STORE_POLICY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

#include "absl/time/time.h"

#include "store/types.h"

namespace larder {

// A chunk's number inside the engine: dense, reused after removal.
enum class ChunkIndex : uint32_t {};
inline constexpr ChunkIndex kNoChunk = ChunkIndex{UINT32_MAX};

// What a policy may know about a chunk when it enters a tier. The hints come
// from the engine that saved it; all are optional, every policy works without.
struct ChunkFeatures {
  ChunkIndex parent = kNoChunk;  // if it is in the same tier
  uint64_t bytes = 0;
  uint32_t token_begin = 0;
  uint32_t token_count = 0;
  uint8_t priority = 0;      // hint: 0 = none, larger = keep longer
  uint32_t stop_reason = 0;  // hint: the engine's own code, 0 = unknown
  absl::Time now;
};

// Decides what a tier keeps. One instance per tier; the engine calls it under
// its lock: no blocking, no allocation beyond its own tables, O(log n) a call.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  virtual std::string_view name() const = 0;

  // Whether the chunk is worth its bytes in this tier at all.
  virtual bool Admit(const ChunkFeatures& features) = 0;

  virtual void Insert(ChunkIndex chunk, const ChunkFeatures& features) = 0;
  virtual void Touch(ChunkIndex chunk, absl::Time now) = 0;
  virtual void Remove(ChunkIndex chunk) = 0;

  // The chunk to evict next, among those for which `evictable` (bound by the
  // engine: not held, not pinned, not in motion) is true; nullopt if there is
  // none. Leaves before their parents where parents are known.
  class Evictable {
   public:
    virtual ~Evictable() = default;
    virtual bool operator()(ChunkIndex chunk) const = 0;
  };
  virtual std::optional<ChunkIndex> Victim(const Evictable& evictable) = 0;

  // What its tables take, for EngineStats::index_bytes.
  virtual uint64_t MemoryBytes() const = 0;
};

// Least recently used, leaf first: a chunk with children in the tier goes after
// them. The engine touches a chain tail first, so that in the order of use
// parents are younger than their children; chunks without known parents are
// plain LRU. Where no leaf may go (readers hold the ends of all chains), the
// deepest chunk above one goes. eviction.md: the baseline that scan-resistant
// web policies lose to on chains.
std::unique_ptr<EvictionPolicy> NewLruPolicy();

}  // namespace larder

#endif  // LARDER_STORE_POLICY_H_
