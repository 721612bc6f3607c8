#ifndef LARDER_STORE_SPACE_TABLE_H_
#define LARDER_STORE_SPACE_TABLE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "store/hit_rules.h"
#include "store/space.h"
#include "store/types.h"

namespace larder {

// A tenant's space, numbered: what chunks carry instead of 36 bytes.
enum class SpaceRef : uint32_t {};
inline constexpr SpaceRef kNoSpace = SpaceRef{UINT32_MAX};

struct Space {
  TenantId tenant{};
  SpaceId id;
  // Shared with copies under way, which read it without the engine's lock.
  std::shared_ptr<const SpaceDescriptor> descriptor;
  Epoch epoch{};
  // Per group: layers x heads x interleave, and the groups it is joint with
  // (itself included).
  std::vector<uint64_t> volumes;
  std::vector<GroupMask> joint;
  // Whether the durable tier knows the space: before it does, a durable record
  // of it could not be recovered.
  enum class Stored : uint8_t { kNo, kWriting, kYes };
  Stored stored = Stored::kNo;
};

// The spaces that were opened. A space is never forgotten while the engine
// lives. Not thread-safe.
class SpaceTable {
 public:
  SpaceRef Find(TenantId tenant, const SpaceId& id) const;
  // REQUIRES: Find(tenant, id) == kNoSpace, Validate(descriptor).ok().
  SpaceRef Insert(TenantId tenant, const SpaceId& id,
                  const SpaceDescriptor& descriptor);

  Space& operator[](SpaceRef ref) { return *spaces_[Raw(ref)]; }
  const Space& operator[](SpaceRef ref) const { return *spaces_[Raw(ref)]; }
  uint32_t size() const { return static_cast<uint32_t>(spaces_.size()); }
  uint32_t CountOf(TenantId tenant) const;
  uint64_t MemoryBytes() const;

 private:
  std::vector<std::unique_ptr<Space>> spaces_;
  absl::flat_hash_map<std::pair<TenantId, SpaceId>, SpaceRef> refs_;
};

}  // namespace larder

#endif  // LARDER_STORE_SPACE_TABLE_H_
