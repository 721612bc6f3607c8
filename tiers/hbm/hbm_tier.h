#ifndef LARDER_TIERS_HBM_HBM_TIER_H_
#define LARDER_TIERS_HBM_HBM_TIER_H_

// The door of tiers/hbm: a pool in device memory (README.md).

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "kernels/cuda/context.h"
#include "store/status.h"
#include "store/tier.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

struct HbmTierOptions {
  // The device. Outlives the tier.
  const kernels::cuda::Context* context = nullptr;
  // The most device memory that the pool ever takes, rounded down to whole
  // slabs; none is taken before it is needed. Retired slabs that clients still
  // map count.
  uint64_t capacity_bytes = 0;
  // One slab and the largest extent; a multiple of the device's granularity
  // (2 MiB on all that are known), at most 64 GiB, no more than the capacity.
  uint64_t slab_bytes = 64_MiB;
  // Pinned host memory that copies go through: a few pieces of some MiB keep
  // the link busy.
  uint64_t staging_bytes = 4_MiB;  // a multiple of kPageBytes
  uint32_t staging_buffers = 4;    // at least 1
};

// A Tier over slabs of device memory, each physical memory of its own, mapped
// into one range of addresses. A slab belongs to one tenant from its first
// extent to its end; memory is wiped when it is taken and when it is given
// back.
//
// Not a MemoryTier: the processor cannot touch the bytes. Write and Read are
// copies through pinned memory on a stream of the tier's own, their callbacks
// run on its thread. Clients on the same device import a slab's descriptor and
// read extents where they lie. (A client can map what it imported for writing:
// nothing on the device refuses it. Slabs go to their own tenant's clients
// only, and what comes from here is verified like what comes from any tier.)
//
// A device that is lost takes everything along: Health() says so, every call
// answers Unavailable, and the process must be restarted to use it again.
//
// Thread-safe. Allocate may wait for the driver (some ms per slab) where it
// needs a new slab.
class HbmTier : public DeviceTier {
 public:
  // Where an extent lies in its slab; as for MemoryTier.
  virtual ExtentAddress Address(Extent extent) const = 0;
  // ... and for kernels and copies in this process's context. 0 if there is no
  // such extent.
  virtual kernels::cuda::DevicePtr Locate(Extent extent) const = 0;

  // A slab for clients of its tenant: a descriptor of their own, which the
  // caller closes when it was sent, and which
  // cuMemImportFromShareableHandle(POSIX_FILE_DESCRIPTOR) takes there. NotFound
  // if the slab was retired; FailedPrecondition where the device cannot export.
  struct ExportedSlab {
    uint32_t slab = 0;
    TenantId tenant{};
    uint64_t bytes = 0;
    int fd = -1;
  };
  virtual StatusOr<ExportedSlab> Export(uint32_t slab) = 0;

  // As DramTier: told of every slab that is retired while clients may map it;
  // its memory counts until Forget says that none can any more.
  using RetiredObserver =
      absl::AnyInvocable<void(uint32_t slab, TenantId former_tenant)>;
  virtual void ObserveRetired(RetiredObserver observer) = 0;
  virtual std::vector<uint32_t> RetiredSlabs() const = 0;
  virtual void Forget(uint32_t slab) = 0;

  // As DeviceTier has it, in slabs: those beyond the limit take no new extents
  // and are given back to the device as soon as they are empty: those that are
  // so already before the call returns, the others when the last Free empties
  // them, on the tier's thread. Those with the least in them go first.
  void SetLimit(uint64_t bytes) override = 0;

  // The extents of slabs that are to be given back: fewest bytes first, slab by
  // slab.
  std::vector<Extent> ExtentsBeyondLimit() const override = 0;

  struct Stats {
    uint64_t slabs = 0;
    uint64_t leaving_slabs = 0;    // of slabs: beyond the limit
    uint64_t retired_slabs = 0;    // waiting for Forget
    uint64_t committed_bytes = 0;  // device memory of all of them
    uint64_t slabs_made = 0;       // ever
    uint64_t ignored_calls = 0;    // as DramTier's
  };
  virtual Stats GetStats() const = 0;
};

// InvalidArgument names the option; FailedPrecondition if the device cannot map
// physical memory; ResourceExhausted or Unavailable with the driver's words.
StatusOr<std::unique_ptr<HbmTier>> NewHbmTier(const HbmTierOptions& options);

}  // namespace larder

#endif  // LARDER_TIERS_HBM_HBM_TIER_H_
