#include "store/space_table.h"

namespace larder {

SpaceRef SpaceTable::Find(TenantId tenant, const SpaceId& id) const {
  const auto it = refs_.find({tenant, id});
  return it == refs_.end() ? kNoSpace : it->second;
}

SpaceRef SpaceTable::Insert(TenantId tenant, const SpaceId& id,
                            const SpaceDescriptor& descriptor) {
  auto space = std::make_unique<Space>();
  space->tenant = tenant;
  space->id = id;
  space->descriptor = std::make_shared<const SpaceDescriptor>(descriptor);
  for (size_t g = 0; g < descriptor.groups.size(); ++g) {
    const GroupDescriptor& group = descriptor.groups[g];
    space->volumes.push_back(uint64_t{group.layer_count} * group.kv_head_count *
                             group.interleave_count);
    auto joint = static_cast<GroupMask>(1u << g);
    for (size_t other = 0; other < descriptor.groups.size(); ++other) {
      if (group.joint != 0 && descriptor.groups[other].joint == group.joint) {
        joint |= static_cast<GroupMask>(1u << other);
      }
    }
    space->joint.push_back(joint);
  }
  const auto ref = SpaceRef{static_cast<uint32_t>(spaces_.size())};
  spaces_.push_back(std::move(space));
  refs_.emplace(std::pair(tenant, id), ref);
  return ref;
}

uint32_t SpaceTable::CountOf(TenantId tenant) const {
  uint32_t count = 0;
  for (const auto& space : spaces_) count += space->tenant == tenant ? 1 : 0;
  return count;
}

uint64_t SpaceTable::MemoryBytes() const {
  uint64_t bytes = spaces_.capacity() * sizeof(spaces_[0]) +
                   refs_.capacity() * (sizeof(*refs_.begin()) + 1);
  for (const auto& space : spaces_) {
    bytes +=
        sizeof(Space) + sizeof(SpaceDescriptor) +
        space->descriptor->groups.capacity() *
            (sizeof(GroupDescriptor) + sizeof(uint64_t) + sizeof(GroupMask));
  }
  return bytes;
}

}  // namespace larder
