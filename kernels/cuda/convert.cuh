#ifndef LARDER_KERNELS_CUDA_CONVERT_CUH_
#define LARDER_KERNELS_CUDA_CONVERT_CUH_

#include "kernels/cuda/convert_types.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"

namespace larder::kernels::cuda {
namespace {

template <Element kFrom, Element kTo, bool kScaled>
__device__ __forceinline__ void ConvertRowsWith(const RowsConversion& c) {
  const uint32_t row_threads = ConvertThreadsOfRow(c.width);
  const uint32_t rows = kConvertThreads / row_threads;
  const uint32_t first = (threadIdx.x & (row_threads - 1)) * kConvertElements;
  const bool whole = ((reinterpret_cast<uintptr_t>(c.src) |
                       static_cast<uintptr_t>(c.src_stride)) &
                      (AlignmentOf8<kFrom>() - 1)) == 0 &&
                     ((reinterpret_cast<uintptr_t>(c.dst) |
                       static_cast<uintptr_t>(c.dst_stride)) &
                      (AlignmentOf8<kTo>() - 1)) == 0;
  for (uint64_t row = uint64_t{blockIdx.x} * rows + threadIdx.x / row_threads;
       row < c.rows; row += uint64_t{gridDim.x} * rows) {
    const auto at = static_cast<int64_t>(row);
    const unsigned char* const src =
        static_cast<const unsigned char*>(c.src) + at * c.src_stride;
    unsigned char* const dst =
        static_cast<unsigned char*>(c.dst) + at * c.dst_stride;
    float scale = 1;
    if constexpr (kScaled) {
      scale = __ldg(c.scales + row / c.rows_per_scale % c.scale_count);
    }
    for (uint32_t i = first; i < c.width; i += row_threads * kConvertElements) {
      if (whole && i + kConvertElements <= c.width) {
        float values[kConvertElements];
        Load8<kFrom>(src + i / 8 * BitsOf<kFrom>(), values);
        if constexpr (kScaled) {
#pragma unroll
          for (float& value : values) value = __fmul_rn(value, scale);
        }
        Store8<kTo>(dst + i / 8 * BitsOf<kTo>(), values);
        continue;
      }
      for (uint32_t j = i; j < c.width && j < i + kConvertElements; ++j) {
        float value = LoadElement<kFrom>(src, j);
        if constexpr (kScaled) value = __fmul_rn(value, scale);
        StoreElement<kTo>(dst, j, value);
      }
    }
  }
}

// Apart, because a compiler may take no scale for a scale of 1, which makes
// NaNs quiet.
template <Element kFrom, Element kTo>
__device__ __forceinline__ void ConvertRows(const RowsConversion& c) {
  if (c.scales != nullptr) {
    ConvertRowsWith<kFrom, kTo, true>(c);
  } else {
    ConvertRowsWith<kFrom, kTo, false>(c);
  }
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CONVERT_CUH_
