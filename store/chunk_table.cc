#include "store/chunk_table.h"

#include <algorithm>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"

namespace larder {
namespace {

// What the allocator adds to an array of parts.
constexpr uint64_t kAllocationBytes = 16;

// All 32 bytes: clients choose ids, and could choose them alike.
size_t HashOf(SpaceRef space, const ChunkId& id) {
  return absl::HashOf(
      Raw(space),
      absl::string_view(reinterpret_cast<const char*>(id.bytes.data()),
                        id.bytes.size()));
}

}  // namespace

size_t ChunkTable::Hash::operator()(const Key& key) const {
  return HashOf(key.space, key.id);
}
size_t ChunkTable::Hash::operator()(ChunkIndex index) const {
  const ChunkEntry& chunk = (*table)[index];
  return HashOf(chunk.space, chunk.id);
}
bool ChunkTable::Equal::operator()(ChunkIndex index, const Key& key) const {
  const ChunkEntry& chunk = (*table)[index];
  return chunk.space == key.space && chunk.id == key.id;
}

ChunkTable::ChunkTable()
    : shards_(kShards, Shard(0, Hash{this}, Equal{this})) {}

ChunkIndex ChunkTable::Find(SpaceRef space, const ChunkId& id) const {
  const Shard& shard = shards_[ShardOf(id)];
  const auto it = shard.find(Key{space, id});
  return it == shard.end() ? kNoChunk : *it;
}

ChunkIndex ChunkTable::Insert(SpaceRef space, const ChunkId& id) {
  ChunkIndex index;
  if (free_.empty()) {
    index = ChunkIndex{slots_.size()};
    slots_.Grow(slots_.size() + 1);
  } else {
    index = free_.back();
    free_.pop_back();
  }
  ChunkEntry& chunk = slots_[Raw(index)];
  chunk.space = space;
  chunk.id = id;
  chunk.live = true;
  shards_[ShardOf(id)].insert(index);
  ++live_;
  return index;
}

void ChunkTable::Unlist(ChunkIndex index) {
  ChunkEntry& chunk = slots_[Raw(index)];
  shards_[ShardOf(chunk.id)].erase(index);
  chunk.live = false;
  --live_;
}

void ChunkTable::Erase(ChunkIndex index) {
  ChunkEntry& chunk = slots_[Raw(index)];
  if (chunk.parts != nullptr) {
    part_bytes_ -= chunk.part_capacity * sizeof(PartEntry) + kAllocationBytes;
  }
  chunk = ChunkEntry{};
  free_.push_back(index);
}

PartEntry* ChunkTable::FindPart(ChunkIndex index, uint32_t version) {
  for (PartEntry& part : Parts(index)) {
    if (part.version == version) return &part;
  }
  return nullptr;
}

PartEntry* ChunkTable::FindPart(ChunkIndex index, GroupIndex group,
                                const PartShape& shape) {
  for (PartEntry& part : Parts(index)) {
    if (part.group == group && part.shape == shape) return &part;
  }
  return nullptr;
}

void ChunkTable::ReserveParts(ChunkIndex index, size_t count) {
  ChunkEntry& chunk = slots_[Raw(index)];
  if (count <= chunk.part_capacity) return;
  auto parts = std::make_unique<PartEntry[]>(count);
  std::move(chunk.parts.get(), chunk.parts.get() + chunk.part_count,
            parts.get());
  if (chunk.parts == nullptr) part_bytes_ += kAllocationBytes;
  part_bytes_ += (count - chunk.part_capacity) * sizeof(PartEntry);
  chunk.parts = std::move(parts);
  chunk.part_capacity = static_cast<uint16_t>(count);
}

PartEntry& ChunkTable::AddPart(ChunkIndex index) {
  ChunkEntry& chunk = slots_[Raw(index)];
  if (chunk.part_count == chunk.part_capacity) {
    ReserveParts(index, std::max<size_t>(1, 2 * size_t{chunk.part_capacity}));
  }
  PartEntry& part = chunk.parts[chunk.part_count++];
  part = PartEntry{};
  return part;
}

void ChunkTable::RemovePart(ChunkIndex index, PartEntry* part) {
  ChunkEntry& chunk = slots_[Raw(index)];
  for (const Level level : kAllLevels) DropCopy(index, *part, level);
  PartEntry* last = &chunk.parts[chunk.part_count - 1];
  if (part != last) *part = *last;
  --chunk.part_count;
}

Extent ChunkTable::Copy(ChunkIndex index, const PartEntry& part,
                        Level level) const {
  switch (level) {
    case Level::kDram:
      return part.dram();
    case Level::kDevice:
      return part.on_device ? device_.at({index, part.version}) : Extent{};
    case Level::kDurable:
      return part.durable();
    case Level::kPeer:
      return part.at_peer ? peer_.at({index, part.version}).extent : Extent{};
  }
  return {};
}

CopyFacts ChunkTable::DurableFacts(ChunkIndex index,
                                   const PartEntry& part) const {
  return part.durable_differs ? durable_facts_.at({index, part.version})
                              : part.facts();
}

CopyPlanes ChunkTable::DurablePlanes(ChunkIndex index,
                                     const PartEntry& part) const {
  const auto it = durable_planes_.find({index, part.version});
  return it == durable_planes_.end() ? CopyPlanes{} : it->second;
}

CopyPlanes ChunkTable::PeerPlanes(ChunkIndex index,
                                  const PartEntry& part) const {
  return part.at_peer ? peer_.at({index, part.version}).planes : CopyPlanes{};
}

void ChunkTable::SetDurableCopy(ChunkIndex index, PartEntry& part,
                                Extent extent, const CopyFacts& facts,
                                const CopyPlanes& planes) {
  DropDurableCopy(index, part);
  if (planes.planes > 1) durable_planes_[{index, part.version}] = planes;
  part.durable_handle = extent.handle;
  part.durable_pages = static_cast<uint32_t>(extent.bytes / kPageBytes);
  if ((part.copies() & ~Bit(Level::kDurable)) == 0) {
    part.set_facts(facts);
  } else if (facts != part.facts()) {
    part.durable_differs = true;
    durable_facts_[{index, part.version}] = facts;
  }
}

void ChunkTable::DropDurableCopy(ChunkIndex index, PartEntry& part) {
  if (part.durable_differs) durable_facts_.erase({index, part.version});
  if (!durable_planes_.empty()) durable_planes_.erase({index, part.version});
  part.durable_differs = false;
  part.durable_outdated = false;
  part.durable_handle = 0;
  part.durable_pages = 0;
}

void ChunkTable::SetDeviceCopy(ChunkIndex index, PartEntry& part,
                               Extent extent) {
  part.on_device = true;
  device_[{index, part.version}] = extent;
}

void ChunkTable::SetPeerCopy(ChunkIndex index, PartEntry& part, Extent extent,
                             const CopyPlanes& planes) {
  part.at_peer = true;
  peer_[{index, part.version}] = {extent, planes};
}

void ChunkTable::DropCopy(ChunkIndex index, PartEntry& part, Level level) {
  if ((part.copies() & Bit(level)) == 0) return;
  switch (level) {
    case Level::kDram:
      part.set_dram({});
      break;
    case Level::kDevice:
      part.on_device = false;
      device_.erase({index, part.version});
      break;
    case Level::kDurable:
      DropDurableCopy(index, part);
      return;
    case Level::kPeer:
      part.at_peer = false;
      peer_.erase({index, part.version});
      return;
  }
  if ((part.copies() & ~Bit(Level::kDurable)) != 0) return;
  part.durable_outdated = false;
  if (!part.durable_differs) return;
  const auto it = durable_facts_.find({index, part.version});
  part.set_facts(it->second);
  part.durable_differs = false;
  durable_facts_.erase(it);
}

uint64_t ChunkTable::MemoryBytes() const {
  uint64_t bytes =
      slots_.MemoryBytes() + free_.capacity() * sizeof(ChunkIndex) +
      shards_.capacity() * sizeof(Shard) + part_bytes_ +
      durable_facts_.capacity() *
          (sizeof(decltype(durable_facts_)::value_type) + 1) +
      durable_planes_.capacity() *
          (sizeof(decltype(durable_planes_)::value_type) + 1) +
      device_.capacity() * (sizeof(decltype(device_)::value_type) + 1) +
      peer_.capacity() * (sizeof(decltype(peer_)::value_type) + 1);
  for (const Shard& shard : shards_) {
    bytes += shard.capacity() * (sizeof(ChunkIndex) + 1);
  }
  return bytes;
}

}  // namespace larder
