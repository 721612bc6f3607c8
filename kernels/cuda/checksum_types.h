#ifndef LARDER_KERNELS_CUDA_CHECKSUM_TYPES_H_
#define LARDER_KERNELS_CUDA_CHECKSUM_TYPES_H_

// XXH3-128 with seed 0 (Collet, xxHash 0.8) of many ranges on a device, with
// the same result as on the CPU for every length: what records' segments carry.
//
// A warp takes a range. Within a block of 1 KiB all of XXH3's sums are shared
// by its lanes; block follows block, so a range goes at some gigabytes per
// second and it takes a few thousand ranges, or segments, to fill a large
// device.

#include <stdint.h>

#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

// Bytes of any alignment; 16 bytes at a time where they begin at a multiple of
// 16.
struct alignas(16) ChecksumRange {
  const void* bytes;
  uint64_t size;
};

// As store/types.h has a checksum.
struct alignas(16) ChecksumResult {
  uint64_t low;
  uint64_t high;
};

struct Checksums {
  const ChecksumRange* ranges;
  ChecksumResult* results;
  uint32_t count;
};

inline constexpr uint32_t kChecksumThreads = 128;

inline LaunchPlan PlanChecksums(const Checksums& checksums) {
  LaunchPlan plan;
  if (checksums.count == 0) return plan;
  constexpr uint32_t kWarps = kChecksumThreads / 32;
  plan.entry = "larder_checksum";
  plan.grid[0] = checksums.count / kWarps + (checksums.count % kWarps != 0);
  plan.block_threads = kChecksumThreads;
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CHECKSUM_TYPES_H_
