#ifndef LARDER_KERNELS_CUDA_CONVERT_TYPES_H_
#define LARDER_KERNELS_CUDA_CONVERT_TYPES_H_

// Conversions of rows (kernels/convert.h) on a device, to f16, bf16 and f32,
// with the same result to the bit. All pointers are to device memory.

#include <stdint.h>

#include "kernels/convert.h"
#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

// A thread converts so many elements at a time; in one piece where addresses
// and strides are multiples of their bytes (of 16, if those are more).
inline constexpr uint32_t kConvertElements = 8;
inline constexpr uint32_t kConvertThreads = 256;
// A row's threads: a power of two up to a warp.
#if defined(__CUDACC__)
__host__ __device__
#endif
    constexpr uint32_t
    ConvertThreadsOfRow(uint32_t width) {
  uint32_t threads = 1;
  while (threads < 32 && threads * kConvertElements < width) threads *= 2;
  return threads;
}

// Nothing to launch also where the destination is none of the three.
inline LaunchPlan PlanConvert(const RowsConversion& conversion) {
  static const char* const kEntries[6][3] = {
      {"larder_convert_f16_f16", "larder_convert_f16_bf16",
       "larder_convert_f16_f32"},
      {"larder_convert_bf16_f16", "larder_convert_bf16_bf16",
       "larder_convert_bf16_f32"},
      {"larder_convert_f32_f16", "larder_convert_f32_bf16",
       "larder_convert_f32_f32"},
      {"larder_convert_e4m3_f16", "larder_convert_e4m3_bf16",
       "larder_convert_e4m3_f32"},
      {"larder_convert_int8_f16", "larder_convert_int8_bf16",
       "larder_convert_int8_f32"},
      {"larder_convert_int4_f16", "larder_convert_int4_bf16",
       "larder_convert_int4_f32"}};
  LaunchPlan plan;
  const auto from = static_cast<uint32_t>(conversion.src_element);
  const auto to = static_cast<uint32_t>(conversion.dst_element);
  if (conversion.rows == 0 || conversion.width == 0 || from >= 6 || to >= 3) {
    return plan;
  }
  const uint32_t rows_of_block =
      kConvertThreads / ConvertThreadsOfRow(conversion.width);
  const uint64_t blocks = (conversion.rows + rows_of_block - 1) / rows_of_block;
  plan.entry = kEntries[from][to];
  // Blocks take rows by turns.
  plan.grid[0] = static_cast<uint32_t>(blocks < (1 << 20) ? blocks : 1 << 20);
  plan.block_threads = kConvertThreads;
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CONVERT_TYPES_H_
