#ifndef LARDER_KERNELS_CUDA_CONVERT_TYPES_H_
#define LARDER_KERNELS_CUDA_CONVERT_TYPES_H_

// Conversions of rows, and numbers in groups to rows (kernels/convert.h) on a
// device, with the same result to the bit. All pointers are to device memory.
//
// Where rows lie at multiples of 16 bytes and are as long, a warp takes 32
// pieces of 16 bytes of the narrower side at a time, and as much of the wider
// one as they are: lanes exchange words so that every access of either side is
// of 16 bytes next to those of the lane's neighbours. Other rows are converted
// element by element.

#include <stdint.h>

#include "kernels/convert.h"
#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

inline constexpr uint32_t kConvertThreads = 256;
// Without pieces a thread does so many elements of a row at a time.
inline constexpr uint32_t kConvertElements = 8;

inline constexpr uint32_t ConvertBits(Element element) {
  switch (element) {
    case Element::kF32:
      return 32;
    case Element::kF16:
    case Element::kBf16:
      return 16;
    case Element::kE4m3:
    case Element::kInt8:
      return 8;
    default:
      return 4;
  }
}

// A warp for every 32 pieces.
inline LaunchPlan ConvertPlan(const char* entry, uint64_t rows, uint32_t width,
                              Element from, Element to) {
  LaunchPlan plan;
  constexpr uint64_t kWarpsOfBlock = kConvertThreads / 32;
  const uint32_t from_bits = ConvertBits(from), to_bits = ConvertBits(to);
  const uint64_t piece = 128 / (from_bits < to_bits ? from_bits : to_bits);
  const uint64_t warps = (rows * ((width + piece - 1) / piece) + 31) / 32;
  const uint64_t blocks = (warps + kWarpsOfBlock - 1) / kWarpsOfBlock;
  plan.entry = entry;
  // Warps take what there is by turns.
  plan.grid[0] = static_cast<uint32_t>(blocks < (1 << 20) ? blocks : 1 << 20);
  plan.block_threads = kConvertThreads;
  return plan;
}

// Nothing to launch also beyond 2^32 - 1 rows.
inline LaunchPlan PlanConvert(const RowsConversion& conversion) {
#define LARDER_ROW(from)                                               \
  {                                                                    \
    "larder_convert_" from "_f16", "larder_convert_" from "_bf16",     \
        "larder_convert_" from "_f32", "larder_convert_" from "_e4m3", \
        "larder_convert_" from "_int8", "larder_convert_" from "_int4" \
  }
  // As kernels/paged.h numbers elements.
  static const char* const kEntries[6][6] = {
      LARDER_ROW("f16"),  LARDER_ROW("bf16"), LARDER_ROW("f32"),
      LARDER_ROW("e4m3"), LARDER_ROW("int8"), LARDER_ROW("int4")};
#undef LARDER_ROW
  const auto from = static_cast<uint32_t>(conversion.src_element);
  const auto to = static_cast<uint32_t>(conversion.dst_element);
  if (conversion.rows == 0 || conversion.rows > UINT32_MAX ||
      conversion.width == 0 || from >= 6 || to >= 6) {
    return {};
  }
  return ConvertPlan(kEntries[from][to], conversion.rows, conversion.width,
                     conversion.src_element, conversion.dst_element);
}

// Nothing to launch also for other codes than kInt8 and kInt4, or beyond
// 2^32 - 1 tokens.
inline LaunchPlan PlanDecodeGrouped(const GroupedRows& rows) {
  static const char* const kEntries[2][3] = {
      {"larder_decode_grouped_int8_f16", "larder_decode_grouped_int8_bf16",
       "larder_decode_grouped_int8_f32"},
      {"larder_decode_grouped_int4_f16", "larder_decode_grouped_int4_bf16",
       "larder_decode_grouped_int4_f32"}};
  const bool small = rows.code_element == Element::kInt4;
  const auto to = static_cast<uint32_t>(rows.dst_element);
  if (rows.tokens == 0 || rows.tokens > UINT32_MAX || rows.channels == 0 ||
      rows.tokens_per_group == 0 || rows.channels_per_group == 0 ||
      (!small && rows.code_element != Element::kInt8) || to >= 3) {
    return {};
  }
  return ConvertPlan(kEntries[small ? 1 : 0][to], rows.tokens, rows.channels,
                     rows.code_element, rows.dst_element);
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CONVERT_TYPES_H_
