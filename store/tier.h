#ifndef LARDER_STORE_TIER_H_
#define LARDER_STORE_TIER_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/executor.h"
#include "store/hit_rules.h"
#include "store/record.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// Contiguous bytes in a tier. `handle` means something to its tier only and
// stays the same while the tier moves the bytes (garbage collection).
struct Extent {
  uint64_t handle = 0;  // 0 = none
  uint64_t bytes = 0;   // as allocated: a multiple of kPageBytes
  explicit operator bool() const { return handle != 0; }
  bool operator==(const Extent&) const = default;
};

struct TierUsage {
  uint64_t capacity_bytes = 0;
  uint64_t used_bytes = 0;   // allocated extents, whether written or not
  uint64_t waste_bytes = 0;  // rounding, fragmentation, dead log space
};

// What one medium must be able to do. The engine is written against this alone;
// tests/conformance/tier_conformance.h holds every implementation to it.
//
// Thread-safe. `Done` callbacks run exactly once, on any thread, possibly
// before the call that took them returns, never with a lock of the tier held.
class Tier {
 public:
  using Done = absl::AnyInvocable<void(Status) &&>;

  virtual ~Tier() = default;

  virtual TierKind kind() const = 0;
  virtual TierUsage Usage() const = 0;
  // The largest extent that Allocate can ever give.
  virtual uint64_t MaxExtentBytes() const = 0;

  // Reserves room for a record of `bytes` (rounded up to pages). Counts against
  // capacity at once. ResourceExhausted when there is none; the engine then
  // evicts and asks again.
  virtual StatusOr<Extent> Allocate(TenantId tenant, uint64_t bytes) = 0;

  // Gives an extent back. The caller promises that no reader is left, except
  // for Reads and Writes of its own that are under way: for those the tier
  // waits before it reuses the bytes.
  virtual void Free(Extent extent) = 0;

  // Stores a record. `record` (RoundUp(meta.record_bytes, kPageBytes) bytes,
  // page-aligned, of which those past record_bytes may be anything) stays
  // unchanged until `done`. For a durable tier `done(OK)` means: survives power
  // loss and is found by Recover. On error the extent holds nothing and must be
  // freed. ABORTED BY Free: done(Cancelled).
  virtual void Write(Extent extent, const RecordMeta& meta, ByteSpan record,
                     Done done) = 0;

  // Reads [offset, offset + into.size()) of the stored record. Offset and size
  // are multiples of kPageBytes, `into` page-aligned and untouched after
  // `done`. Bytes are as the medium returned them: the caller verifies the
  // record. DataLoss / Unavailable on a medium error; never a short success.
  virtual void Read(Extent extent, uint64_t offset, MutableByteSpan into,
                    Done done) = 0;
};

// Where an extent lies in memory that clients can map.
struct ExtentAddress {
  uint32_t slab = 0;  // number, unique while the daemon lives
  uint64_t offset = 0;
  bool operator==(const ExtentAddress&) const = default;
};

struct SlabInfo {
  uint32_t slab = 0;
  TenantId tenant{};
  uint64_t bytes = 0;
  int fd = -1;  // borrowed; a client's mapping of it is read-only
};

// A tier whose extents are memory of this host.
class MemoryTier : public Tier {
 public:
  // The bytes of an extent, writable by the daemon alone. Valid until Free.
  virtual MutableByteSpan Map(Extent extent) = 0;
  virtual ExtentAddress Address(Extent extent) const = 0;

  // Gives back the pages of an extent beyond `bytes`; the handle stays.
  virtual Extent Shrink(Extent extent, uint64_t bytes) = 0;

  // NotFound if the slab was retired.
  virtual StatusOr<SlabInfo> Slab(uint32_t slab) const = 0;

  // Called (from Allocate, or at once for those that exist) with the memory of
  // every slab, so that an I/O layer can register it; and with `added` false
  // before it is unmapped.
  using SlabObserver =
      absl::AnyInvocable<void(MutableByteSpan memory, bool added)>;
  virtual void ObserveSlabs(SlabObserver observer) = 0;
};

// A tier in the memory of an accelerator: volatile like DRAM, out of the
// processor's reach, and lent: who computes on the device may want some back.
class DeviceTier : public Tier {
 public:
  // How much it may have from now on, up to what it was made for; that is
  // Usage().capacity_bytes then. Beyond it nothing new is allocated, and memory
  // goes back to the device as it becomes empty.
  virtual void SetLimit(uint64_t bytes) = 0;

  // What is in the way of a lower limit: the extents whose eviction gives
  // memory back soonest. Empty if nothing is.
  virtual std::vector<Extent> ExtentsBeyondLimit() const = 0;

  // OK, or why the device cannot be used any more: then every call is
  // Unavailable, and what the tier had is lost.
  virtual Status Health() const = 0;
};

// What other nodes of the cluster have, as a tier: read only, and known only
// for a while. Allocate gives nothing and Write fails; an extent is what Take
// gave, and Free ends its use. A Read fails with Unavailable within bounded
// time if its node is gone or has the record no more. Free does not wait: a
// Read that is under way lands, or not, before its `done`.
class PeerTier : public Tier {
 public:
  // A chunk as some node has it.
  struct Chunk {
    GroupMask groups = 0;  // that are complete there; 0: none is known to have
                           // the chunk
    Lineage lineage = Lineage::kExact;
    uint32_t token_count = 0;
    bool is_tail = false;
    uint64_t bytes = 0;  // of its records
  };
  // What is known at this moment of chunks of this epoch, without waiting: a
  // look-up, as Address is. One element of `out` per id.
  virtual void Find(TenantId tenant, const SpaceId& space, Epoch epoch,
                    std::span<const ChunkId> ids, std::span<Chunk> out) = 0;

  struct Part {
    RecordMeta meta;  // generation and root_content are not known
    Extent extent;
  };
  // All parts of its complete groups at the node that it is best read from.
  // Empty if none is known to have it. A look-up, too. The caller believes
  // nothing of it.
  virtual std::vector<Part> Take(TenantId tenant, const SpaceId& space,
                                 Epoch epoch, const ChunkId& chunk) = 0;

  // Asks who has ids[start..] of a prompt (of which `ids` are all, chunk 0
  // first), unless that is known; then Find knows. `done` once, by `deadline`,
  // from any thread, possibly within the call.
  virtual void Locate(TenantId tenant, const SpaceId& space, Epoch epoch,
                      std::vector<ChunkId> ids, uint32_t start,
                      absl::Time deadline, Task done) = 0;
};

// A tier that survives restart and power loss.
class DurableTier : public Tier {
 public:
  // Calls `found` once for every record that was durable, before anything else
  // is called. Newest generation wins where a part was written twice. Reports
  // what it had to drop. Payload is not read.
  struct RecoveryReport {
    uint64_t records = 0;
    uint64_t dropped_records = 0;  // torn, never acknowledged
    bool rebuilt_from_footers = false;
    std::string note;  // one line for the log
  };
  using Found = absl::AnyInvocable<void(const RecordMeta&, Extent)>;
  virtual StatusOr<RecoveryReport> Recover(Found found) = 0;

  // Small facts that must survive with the data (space descriptors, epochs,
  // pins): last writer wins per key. `done(OK)` = durable, found also when the
  // index is lost. An empty value deletes. Keys <= 128 bytes, values <= 48 KiB.
  virtual void PutControl(std::string key, std::string value, Done done) = 0;
  using Control = absl::AnyInvocable<void(const std::string& key,
                                          const std::string& value)>;
  // After Recover.
  virtual void ForEachControl(Control control) = 0;

  // Marks records dead durably in the background (Free alone is remembered at
  // the next index write): `done` when everything before it is on disk.
  virtual void Flush(Done done) = 0;

  // OK, or why the tier refuses writes (full file system, failed sync). Reads
  // may still work.
  virtual Status Health() const = 0;

  // How many bytes users asked to store, and how many were written for it
  // (frames, footers, garbage collection): write amplification.
  struct WriteCounters {
    uint64_t user_bytes = 0;
    uint64_t device_bytes = 0;
    uint64_t gc_bytes = 0;
  };
  virtual WriteCounters Writes() const = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_TIER_H_
