#ifndef LARDER_KERNELS_CUDA_PAGES_CUH_
#define LARDER_KERNELS_CUDA_PAGES_CUH_

// Where tokens and their rows are, for all kernels.

#include "kernels/cuda/device.h"
#include "kernels/paged.h"

namespace larder::kernels::cuda {
namespace {

struct Place {
  uint64_t block;
  uint32_t token;  // of the block
  bool skipped;
};

// Divisions of 64 bits are long code on a device, and blocks mostly have 2^n
// tokens.
__device__ __forceinline__ Place PlaceOf(const TokenPlaces& places,
                                         uint64_t token) {
  const uint32_t n = places.block_tokens;
  const bool power = (n & (n - 1)) == 0;
  const int shift = __ffs(static_cast<int>(n)) - 1;
  if (places.tokens_per_place == 1) {
    const int64_t place = __ldg(places.places + token);
    if (place < 0) return {0, 0, true};
    const auto at = static_cast<uint64_t>(place);
    if (power) {
      return {at >> shift, static_cast<uint32_t>(at) & (n - 1), false};
    }
    return {at / n, static_cast<uint32_t>(at % n), false};
  }
  const uint64_t index = power ? token >> shift : token / n;
  const int64_t block = __ldg(places.places + index);
  if (block < 0) return {0, 0, true};
  return {static_cast<uint64_t>(block),
          static_cast<uint32_t>(token - index * n), false};
}

__device__ __forceinline__ char* RowAt(const PagedPlane& plane,
                                       const Place& place, uint32_t head) {
  return static_cast<char*>(plane.base) +
         static_cast<int64_t>(place.block) * plane.block_stride +
         static_cast<int64_t>(place.token) * plane.token_stride +
         static_cast<int64_t>(head) * plane.head_stride;
}

__device__ __forceinline__ char* RowAt(const DensePlane& plane, uint64_t token,
                                       uint32_t head) {
  return static_cast<char*>(plane.base) +
         static_cast<int64_t>(head) * plane.head_stride +
         static_cast<int64_t>(token) * plane.token_stride;
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_PAGES_CUH_
