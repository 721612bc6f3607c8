#ifndef LARDER_TIERS_DRAM_DRAM_TIER_H_
#define LARDER_TIERS_DRAM_DRAM_TIER_H_

// The door of tiers/dram: host memory that the daemon alone can write and that
// clients of one tenant can map to read (README.md).

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "store/status.h"
#include "store/tier.h"
#include "store/types.h"
#include "store/units.h"
#include "tiers/dram/sealed_memory.h"

namespace larder {

struct DramTierOptions {
  // All memory that slabs may take together, rounded down to 2 MiB. Kept at
  // every moment, retired slabs that clients still map included.
  uint64_t capacity_bytes = 0;
  // One slab, a multiple of 2 MiB, at most 64 GiB; the largest extent. If it
  // does not divide the capacity, one slab is as large as what is left over.
  uint64_t slab_bytes = 256_MiB;
  HugePages huge_pages = HugePages::kAuto;
  // Makes all slabs at once instead of each when it is first needed: slow to
  // start (about 0.1 s per 256 MiB), no pauses later.
  bool prefault = false;
  // Memory of this NUMA node only; -1 = any. Ignored where there is one node.
  int numa_node = -1;
  // Called while prefault is under way, with bytes done and in all.
  absl::AnyInvocable<void(uint64_t done_bytes, uint64_t total_bytes)> progress;
};

// A MemoryTier over slabs, each a sealed memfd that belongs to one tenant.
//
// When a slab is empty and another tenant needs the room it is retired: wiped,
// unmapped, and replaced by a new one under a new number; no memory object is
// ever seen by two tenants. A slab that Slab() has told about may be mapped by
// clients, which keeps its memory alive: it counts against the capacity until
// the session layer calls Forget. Others are given up at once.
//
//   tier.ObserveRetired([&](uint32_t slab, TenantId tenant) {
//     ... tell the tenant's clients to unmap it; when all have, or have died:
//     tier.Forget(slab);
//   });
//
// Thread-safe. Allocate may take as long as it takes to fault in or wipe one
// slab (0.1 s per 256 MiB), during which only other Allocates that need a new
// slab wait. Read and Write copy within the call.
class DramTier : public MemoryTier {
 public:
  // Called for every slab that is retired while clients may map it, from
  // Allocate, with its descriptor still open. May call Forget, not Allocate.
  using RetiredObserver =
      absl::AnyInvocable<void(uint32_t slab, TenantId former_tenant)>;
  virtual void ObserveRetired(RetiredObserver observer) = 0;

  // Retired slabs that were not forgotten yet.
  virtual std::vector<uint32_t> RetiredSlabs() const = 0;

  // The caller promises that no client maps `slab` any more (or can: the
  // descriptor was sent to nobody who lives). Ends its descriptor and gives its
  // room back. Nothing happens if it is not a retired slab.
  virtual void Forget(uint32_t slab) = 0;

  struct Stats {
    uint64_t slabs = 0;            // in service, spare ones included
    uint64_t spare_slabs = 0;      // made by prefault, of no tenant yet
    uint64_t huge_slabs = 0;       // of slabs: made of huge pages
    uint64_t retired_slabs = 0;    // waiting for Forget
    uint64_t retired_bytes = 0;    // ... what they hold
    uint64_t committed_bytes = 0;  // memory of all of them, <= capacity
    uint64_t slabs_made = 0;       // ever
    // Calls with a handle that no extent has: mistakes of Larder's own, ignored
    // in release builds (others abort).
    uint64_t ignored_calls = 0;
  };
  virtual Stats GetStats() const = 0;
};

// InvalidArgument names the option; else as SealedMemory::Create (prefault).
StatusOr<std::unique_ptr<DramTier>> NewDramTier(DramTierOptions options);

}  // namespace larder

#endif  // LARDER_TIERS_DRAM_DRAM_TIER_H_
