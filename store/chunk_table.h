#ifndef LARDER_STORE_CHUNK_TABLE_H_
#define LARDER_STORE_CHUNK_TABLE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"

#include "store/hit_rules.h"
#include "store/policy.h"
#include "store/slot_array.h"
#include "store/space_table.h"
#include "store/tier.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// Where the engine keeps copies.
enum class Level : uint8_t {
  kDram = 0,    // readers read here
  kDevice = 1,  // victims of DRAM, in memory of an accelerator
  kDurable = 2,
  kPeer = 3,  // of another node: known only while it is being fetched
};
inline constexpr size_t kLevels = 4;
inline constexpr Level kAllLevels[] = {Level::kDram, Level::kDevice,
                                       Level::kDurable, Level::kPeer};
// Where this node stores: what policies rank, events tell and people see.
inline constexpr Level kOwnLevels[] = {Level::kDram, Level::kDevice,
                                       Level::kDurable};
using LevelMask = uint8_t;
constexpr LevelMask Bit(Level level) {
  return static_cast<LevelMask>(1 << Raw(level));
}

// What tells one copy's record from another's.
struct CopyFacts {
  Checksum checksum;  // of the record's header
  uint64_t record_bytes = 0;
  CodecId codec = CodecId::kRaw;
  Lineage lineage = Lineage::kExact;
  bool operator==(const CopyFacts&) const = default;
};
inline CopyFacts FactsOf(const RecordMeta& meta) {
  return {meta.checksum, meta.record_bytes, meta.codec, meta.lineage};
}

// How much of a durable copy its first planes are, and what they give.
struct CopyPlanes {
  uint8_t planes = 1;
  std::array<PlaneCut, kPlanesMax - 1> cuts{};
};
inline CopyPlanes PlanesOf(const RecordMeta& meta) {
  return {meta.planes, meta.cuts};
}

// One part of a chunk and where its copies are. The facts of the record are
// those of the copies in DRAM and on the device, which are one record and never
// the worse one; or of the durable copy if it is the only one. If the durable
// one differs (it was encoded), ChunkTable knows its facts. ChunkTable also
// knows the extent on the device: few parts have one.
struct PartEntry {
  uint64_t dram_handle = 0;
  uint64_t durable_handle = 0;
  Checksum checksum;
  uint64_t record_bytes = 0;
  PartShape shape;
  uint32_t dram_pages = 0;
  uint32_t durable_pages = 0;
  // Tells this part from any other that ever was in its place, so that work
  // under way finds out that what it was about is gone.
  uint32_t version = 0;
  GroupIndex group{};
  Lineage lineage = Lineage::kExact;
  CodecId codec = CodecId::kRaw;
  bool on_device : 1 = false;
  bool at_peer : 1 = false;          // and nowhere else
  bool durable_differs : 1 = false;  // from the part's facts
  // The durable copy is of a worse part that this one replaced: it stays until
  // this one is durable, so that nothing acknowledged is lost in between.
  bool durable_outdated : 1 = false;

  // What the write-back knows of it.
  enum class Writing : uint8_t {
    kNot = 0,
    kQueued = 1,   // waits for its turn
    kRunning = 2,  // its memory is being read by the durable tier
    kSettled = 3,  // was durable, or was not admitted: nothing is owed to it
  };
  Writing writing = Writing::kNot;
  bool wanted_durable = false;  // a saver waits for it

  Extent dram() const { return {dram_handle, dram_pages * kPageBytes}; }
  Extent durable() const {
    return {durable_handle, durable_pages * kPageBytes};
  }
  LevelMask copies() const {
    return static_cast<LevelMask>(
        (dram_handle != 0 ? Bit(Level::kDram) : 0) |
        (on_device ? Bit(Level::kDevice) : 0) |
        (durable_handle != 0 ? Bit(Level::kDurable) : 0) |
        (at_peer ? Bit(Level::kPeer) : 0));
  }
  // Has no durable copy of its own.
  bool unwritten() const { return durable_handle == 0 || durable_outdated; }
  CopyFacts facts() const { return {checksum, record_bytes, codec, lineage}; }
  void set_facts(const CopyFacts& facts) {
    checksum = facts.checksum;
    record_bytes = facts.record_bytes;
    codec = facts.codec;
    lineage = facts.lineage;
  }
  // The copy has the part's facts. ChunkTable::DropCopy undoes it.
  void set_dram(Extent extent) {
    dram_handle = extent.handle;
    dram_pages = static_cast<uint32_t>(extent.bytes / kPageBytes);
  }
};
static_assert(sizeof(PartEntry) <= 72);

// A space's epoch as chunks carry it. Compared for equality only; a space whose
// weights change four billion times is not expected.
struct ChunkEpoch {
  uint32_t low = 0;
  ChunkEpoch() = default;
  explicit ChunkEpoch(Epoch epoch) : low(static_cast<uint32_t>(Raw(epoch))) {}
  friend bool operator==(ChunkEpoch chunk, Epoch space) {
    return chunk.low == static_cast<uint32_t>(Raw(space));
  }
};

// A chunk. One that is not `live` any more is found by nobody, and keeps its
// memory only until its last reader is gone. What a match looks at comes first
// and fits one cache line.
struct alignas(64) ChunkEntry {
  ChunkId id;
  int64_t used_ns = 0;  // when last used, on the engine's clock
  uint64_t bytes = 0;   // of one copy of all parts
  SpaceRef space{};
  ChunkEpoch epoch;
  GroupMask visible = 0;  // groups that are covered, with their joint ones
  Lineage lineage = Lineage::kExact;  // the worst of its parts
  bool live : 1 = false;
  bool is_tail : 1 = false;
  bool pinned : 1 = false;
  bool incomplete : 1 = false;  // has parts of groups that are not visible
  bool rooted : 1 = false;      // in RootContents
  bool checking : 1 = false;    // a reported corruption is being looked into
  bool at_peer : 1 = false;     // has parts that are being fetched
  LevelMask readable : 4 = 0;   // every visible part has a copy there
  LevelMask ranked : 4 = 0;     // known to the policy of the tier
  uint8_t priority = 0;

  ChunkId parent;  // zero if none is known
  std::unique_ptr<PartEntry[]> parts;
  uint32_t token_begin = 0;
  uint32_t token_count = 0;
  uint32_t stop_reason = 0;
  uint32_t holds = 0;  // slots of holds that pin it
  uint16_t busy = 0;   // work that reads or writes its memory
  uint16_t part_count = 0;
  uint16_t part_capacity = 0;

  bool Idle() const { return holds == 0 && busy == 0; }
  bool Readable(Level level) const { return (readable & Bit(level)) != 0; }
  bool Ranked(Level level) const { return (ranked & Bit(level)) != 0; }
  bool Visible(GroupIndex group) const {
    return (visible >> Raw(group) & 1) != 0;
  }
};
static_assert(sizeof(ChunkEntry) == 128);

// The index: chunks by (space, id), in dense slots. Not thread-safe.
class ChunkTable {
 public:
  ChunkTable();
  ChunkTable(const ChunkTable&) = delete;
  ChunkTable& operator=(const ChunkTable&) = delete;

  ChunkIndex Find(SpaceRef space, const ChunkId& id) const;
  // Fetches what Find will look at, for callers with many ids to find.
  void Prefetch(SpaceRef space, const ChunkId& id) const {
    shards_[ShardOf(id)].prefetch(Key{space, id});
  }

  // A new live chunk without parts. REQUIRES: not there.
  ChunkIndex Insert(SpaceRef space, const ChunkId& id);
  // Not found any more from here on; the slot stays.
  void Unlist(ChunkIndex index);
  // The slot may be given again. REQUIRES: unlisted.
  void Erase(ChunkIndex index);

  ChunkEntry& operator[](ChunkIndex index) { return slots_[Raw(index)]; }
  const ChunkEntry& operator[](ChunkIndex index) const {
    return slots_[Raw(index)];
  }
  // Every index ever given is smaller; free slots are not live and have no
  // parts.
  uint32_t slots() const { return slots_.size(); }
  uint64_t live() const { return live_; }

  std::span<PartEntry> Parts(ChunkIndex index) {
    ChunkEntry& chunk = slots_[Raw(index)];
    return {chunk.parts.get(), chunk.part_count};
  }
  std::span<const PartEntry> Parts(ChunkIndex index) const {
    const ChunkEntry& chunk = slots_[Raw(index)];
    return {chunk.parts.get(), chunk.part_count};
  }
  // nullptr if there is none. Valid until a part is added or removed.
  PartEntry* FindPart(ChunkIndex index, uint32_t version);
  PartEntry* FindPart(ChunkIndex index, GroupIndex group,
                      const PartShape& shape);
  // Room for `count` parts in all, so that adding them one by one moves nothing
  // and leaves no holes in the heap.
  void ReserveParts(ChunkIndex index, size_t count);
  PartEntry& AddPart(ChunkIndex index);
  void RemovePart(ChunkIndex index, PartEntry* part);

  // The copies of a part: where, if there is one, and what its record is. Only
  // a durable one has facts of its own.
  Extent Copy(ChunkIndex index, const PartEntry& part, Level level) const;
  CopyFacts Facts(ChunkIndex index, const PartEntry& part, Level level) const {
    return level == Level::kDurable ? DurableFacts(index, part) : part.facts();
  }
  CopyFacts DurableFacts(ChunkIndex index, const PartEntry& part) const;
  CopyPlanes DurablePlanes(ChunkIndex index, const PartEntry& part) const;
  CopyPlanes PeerPlanes(ChunkIndex index, const PartEntry& part) const;
  void SetDurableCopy(ChunkIndex index, PartEntry& part, Extent extent,
                      const CopyFacts& facts, const CopyPlanes& planes);
  // REQUIRES: it is the record that is in DRAM; there is none yet.
  void SetDeviceCopy(ChunkIndex index, PartEntry& part, Extent extent);
  // REQUIRES: the part has no copy; its facts are those of this one.
  void SetPeerCopy(ChunkIndex index, PartEntry& part, Extent extent,
                   const CopyPlanes& planes);
  // If there is one. The facts become those of the durable copy if nothing
  // else is left.
  void DropCopy(ChunkIndex index, PartEntry& part, Level level);
  // In no order: (chunk, extent) of every part that is on the device.
  template <class Visit>
  void ForEachDeviceCopy(Visit visit) const {
    for (const auto& [key, extent] : device_) visit(key.first, extent);
  }

  uint64_t MemoryBytes() const;

 private:
  struct Key {
    SpaceRef space;
    const ChunkId& id;
  };
  struct Hash {
    using is_transparent = void;
    const ChunkTable* table;
    size_t operator()(const Key& key) const;
    size_t operator()(ChunkIndex index) const;
  };
  struct Equal {
    using is_transparent = void;
    const ChunkTable* table;
    bool operator()(ChunkIndex a, ChunkIndex b) const { return a == b; }
    bool operator()(ChunkIndex index, const Key& key) const;
    bool operator()(const Key& key, ChunkIndex index) const {
      return (*this)(index, key);
    }
  };
  using Shard = absl::flat_hash_set<ChunkIndex, Hash, Equal>;
  // Growing a shard moves its own entries only: no call waits for more.
  static constexpr size_t kShards = 256;

  static size_t ShardOf(const ChunkId& id) { return id.bytes[31] % kShards; }

  void DropDurableCopy(ChunkIndex index, PartEntry& part);

  SlotArray<ChunkEntry> slots_;
  std::vector<ChunkIndex> free_;
  std::vector<Shard> shards_;
  // Of parts with `durable_differs`, by slot and version.
  absl::flat_hash_map<std::pair<ChunkIndex, uint32_t>, CopyFacts>
      durable_facts_;
  // Of durable copies of more than one plane, likewise.
  absl::flat_hash_map<std::pair<ChunkIndex, uint32_t>, CopyPlanes>
      durable_planes_;
  // Copies of parts that are `on_device`, likewise.
  absl::flat_hash_map<std::pair<ChunkIndex, uint32_t>, Extent> device_;
  // Of parts that are `at_peer`, likewise.
  struct PeerCopy {
    Extent extent;
    CopyPlanes planes;
  };
  absl::flat_hash_map<std::pair<ChunkIndex, uint32_t>, PeerCopy> peer_;
  uint64_t live_ = 0;
  uint64_t part_bytes_ = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_CHUNK_TABLE_H_
