#include "store/cluster/chunk_key.h"

#include <cstring>

#include "store/fingerprint.h"

namespace larder {
namespace {

uint64_t Key(const Scope& scope, const ChunkId& id, uint64_t what) {
  std::byte bytes[sizeof(SpaceId) + sizeof(ChunkId) + sizeof what];
  std::memcpy(bytes, &scope.space, sizeof(SpaceId));
  std::memcpy(bytes + sizeof(SpaceId), &id, sizeof(ChunkId));
  std::memcpy(bytes + sizeof(SpaceId) + sizeof(ChunkId), &what, sizeof what);
  return Fingerprint64(bytes, scope.tenant);
}

}  // namespace

ChunkKey ComputeChunkKey(const Scope& scope, const ChunkId& id) {
  return ChunkKey{Key(scope, id, 1)};
}

AnchorKey ComputeAnchorKey(const Scope& scope, const ChunkId& anchor) {
  return AnchorKey{Key(scope, anchor, 2)};
}

}  // namespace larder
