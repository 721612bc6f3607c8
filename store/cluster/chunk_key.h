#ifndef LARDER_STORE_CLUSTER_CHUNK_KEY_H_
#define LARDER_STORE_CLUSTER_CHUNK_KEY_H_

#include <cstddef>
#include <cstdint>

#include "store/types.h"

namespace larder {

// How nodes name chunks to each other: by 64 bits. Two chunks of one name are
// told apart by who has them: a key only says whom to ask.

// Whose chunks, of which space.
struct Scope {
  // Fingerprint64 of the tenant's name, seeded with something that all nodes of
  // the cluster know and no client does: clients choose chunk ids, and could
  // else choose them such that they have the name of another tenant's.
  uint64_t tenant = 0;
  SpaceId space;
  bool operator==(const Scope&) const = default;
};

enum class ChunkKey : uint64_t {};
enum class AnchorKey : uint64_t {};

// Chunk `index` of a prompt belongs to the anchor ids[AnchorIndex(index)]: who
// knows about one chunk knows about its neighbours, so a prompt asks few nodes.
inline constexpr size_t kAnchorSpacing = 64;
constexpr size_t AnchorIndex(size_t index) {
  return index / kAnchorSpacing * kAnchorSpacing;
}

ChunkKey ComputeChunkKey(const Scope& scope, const ChunkId& id);
AnchorKey ComputeAnchorKey(const Scope& scope, const ChunkId& anchor);

// Where a node has its best copy. On wire.
enum class CopyTier : uint8_t { kGone = 0, kMemory = 1, kDurable = 2 };

// Homes of an anchor that anything is kept at.
inline constexpr size_t kHomesMax = 4;

// What a node tells of a chunk that it has. On wire.
struct ChunkFacts {
  uint64_t groups = 0;  // visible ones, a bit each
  uint32_t pages = 0;   // bytes of one copy / kPageBytes
  uint32_t tokens = 0;
  uint32_t epoch = 0;  // the low 32 bits
  CopyTier tier = CopyTier::kMemory;
  Lineage lineage = Lineage::kExact;
  // How many of its anchor's homes shall have a copy, at most kHomesMax; 0: it
  // stays where it was saved.
  uint8_t copies = 0;
  uint8_t reserved = 0;
  bool operator==(const ChunkFacts&) const = default;
};
static_assert(sizeof(ChunkFacts) == 24);

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_CHUNK_KEY_H_
