#ifndef LARDER_KERNELS_CUDA_PAGED_COPY_TYPES_H_
#define LARDER_KERNELS_CUDA_PAGED_COPY_TYPES_H_

// Paged copies (kernels/paged_copy.h) on a device: K and V of a layer, or one
// plane, in one launch. All pointers are to device memory, or to host memory
// that the device sees. The result is that of the CPU, to the byte; `stream`
// says nothing here. REQUIRES what Gather and Scatter do.

#include <stdint.h>

#include "kernels/cuda/launch_plan.h"
#include "kernels/paged_copy.h"

namespace larder::kernels::cuda {

struct PagedCopies {
  PagedCopy planes[2];
  uint32_t count;  // 1 or 2
};

// Threads move pieces of this many bytes, the largest power of two up to 16
// that divides all addresses, strides and rows.
inline uint32_t PieceBytes(const PagedCopies& copies) {
  uint64_t all = 16;
  for (uint32_t i = 0; i < copies.count; ++i) {
    const PagedCopy& c = copies.planes[i];
    all |= reinterpret_cast<uintptr_t>(c.paged.base) |
           reinterpret_cast<uintptr_t>(c.dense.base) | c.row_bytes |
           static_cast<uint64_t>(c.paged.block_stride) |
           static_cast<uint64_t>(c.paged.token_stride) |
           static_cast<uint64_t>(c.paged.head_stride) |
           static_cast<uint64_t>(c.dense.head_stride) |
           static_cast<uint64_t>(c.dense.token_stride);
  }
  return static_cast<uint32_t>(all & -all);
}

// A row is moved by so many threads, a power of two up to a warp.
inline constexpr uint32_t kPagedCopyThreads = 256;
// Rows of each such group of threads, all under way at once.
inline constexpr uint32_t kPagedCopyRows = 4;
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr uint32_t
    ThreadsOfRow(uint32_t row_bytes, uint32_t piece) {
  uint32_t threads = 1;
  while (threads < 32 && threads * piece < row_bytes) threads *= 2;
  return threads;
}

namespace internal {

inline LaunchPlan PlanPagedCopies(const PagedCopies& copies,
                                  const char* const (&entries)[5]) {
  LaunchPlan plan;
  if (copies.count == 0 || copies.count > 2) return plan;
  const uint32_t piece = PieceBytes(copies);
  uint64_t blocks = 0;
  uint32_t heads = 0;
  for (uint32_t i = 0; i < copies.count; ++i) {
    const PagedCopy& c = copies.planes[i];
    if (c.tokens == 0 || c.heads == 0 || c.row_bytes == 0) continue;
    const uint64_t tokens_of_block =
        kPagedCopyThreads / ThreadsOfRow(c.row_bytes, piece) * kPagedCopyRows;
    const uint64_t needed = (c.tokens + tokens_of_block - 1) / tokens_of_block;
    blocks = needed > blocks ? needed : blocks;
    heads = c.heads > heads ? c.heads : heads;
  }
  if (blocks == 0 || blocks > 0x7fffffff) return plan;
  plan.entry = entries[__builtin_ctz(piece)];
  plan.grid[0] = static_cast<uint32_t>(blocks);
  plan.grid[1] = heads < 65535 ? heads : 65535;
  plan.grid[2] = copies.count;
  plan.block_threads = kPagedCopyThreads;
  return plan;
}

}  // namespace internal

// Nothing to do where no plane has rows.
inline LaunchPlan PlanGather(const PagedCopies& copies) {
  return internal::PlanPagedCopies(
      copies, {"larder_paged_gather_1", "larder_paged_gather_2",
               "larder_paged_gather_4", "larder_paged_gather_8",
               "larder_paged_gather_16"});
}
inline LaunchPlan PlanScatter(const PagedCopies& copies) {
  return internal::PlanPagedCopies(
      copies, {"larder_paged_scatter_1", "larder_paged_scatter_2",
               "larder_paged_scatter_4", "larder_paged_scatter_8",
               "larder_paged_scatter_16"});
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_PAGED_COPY_TYPES_H_
