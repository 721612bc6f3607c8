#ifndef LARDER_KERNELS_CUDA_ATTENTION_TYPES_H_
#define LARDER_KERNELS_CUDA_ATTENTION_TYPES_H_

// Decode attention (kernels/attention.h) on a device, and the merge of its
// parts. All pointers are to device memory. Results differ from the definition
// by no more than attention.h allows, but twice that in `out` and `sum`:
// exponentials are the device's (ex2.approx).
//
// Blocks of tokens are copied to shared memory two deep while the ones before
// are attended; a warp has up to four query heads of a KV head, a lane a token
// of the block for its logit and a few channels for the sum (the split of work
// is that of Flash-Decoding; Dao et al., 2023).

#include <stdint.h>

#include "kernels/attention.h"
#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

inline constexpr uint32_t kAttentionTokens = 32;  // of a tile
inline constexpr uint32_t kAttentionWarps = 8;    // at most
// Behind each row of keys in shared memory, so that lanes that read rows next
// to each other do not meet in a bank.
inline constexpr uint32_t kAttentionRowPad = 16;

// Nothing to launch where there is nothing to do, or where the device has no
// kernel for it: K and V of the same element, f16, bf16, int8 or int4; of 64
// or 128 dims; rows at multiples of 16 bytes, scales and zeros at multiples of
// 4; at most 32 query heads for a KV head; at most 65535 sequences and KV
// heads.
inline LaunchPlan PlanAttention(const DecodeAttention& a) {
  static const char* const kEntries[4][2][3] = {
      {{"larder_attend_f16_64_1", "larder_attend_f16_64_2",
        "larder_attend_f16_64_4"},
       {"larder_attend_f16_128_1", "larder_attend_f16_128_2",
        "larder_attend_f16_128_4"}},
      {{"larder_attend_bf16_64_1", "larder_attend_bf16_64_2",
        "larder_attend_bf16_64_4"},
       {"larder_attend_bf16_128_1", "larder_attend_bf16_128_2",
        "larder_attend_bf16_128_4"}},
      {{"larder_attend_int8_64_1", "larder_attend_int8_64_2",
        "larder_attend_int8_64_4"},
       {"larder_attend_int8_128_1", "larder_attend_int8_128_2",
        "larder_attend_int8_128_4"}},
      {{"larder_attend_int4_64_1", "larder_attend_int4_64_2",
        "larder_attend_int4_64_4"},
       {"larder_attend_int4_128_1", "larder_attend_int4_128_2",
        "larder_attend_int4_128_4"}}};
  LaunchPlan plan;
  if (a.sequences == 0 || a.sequences > 65535 || a.kv_heads == 0 ||
      a.kv_heads > 65535 || a.query_heads == 0 ||
      a.query_heads % a.kv_heads != 0 || a.parts == 0) {
    return plan;
  }
  const uint32_t group = a.query_heads / a.kv_heads;
  const uint32_t dim = a.keys.dim;
  const Element element = a.keys.element;
  if (group > 32 || (dim != 64 && dim != 128) || a.values.dim != dim ||
      a.values.element != element || a.query_element > Element::kF32) {
    return plan;
  }
  uint32_t row_bytes = dim * 2, kind = 0;
  if (element == Element::kBf16) {
    kind = 1;
  } else if (element == Element::kInt8) {
    kind = 2;
    row_bytes = dim;
  } else if (element == Element::kInt4) {
    kind = 3;
    row_bytes = dim / 2;
  } else if (element != Element::kF16) {
    return plan;
  }
  const auto bits = [](const PagedPlane& plane) {
    return reinterpret_cast<uintptr_t>(plane.base) |
           static_cast<uint64_t>(plane.block_stride) |
           static_cast<uint64_t>(plane.token_stride) |
           static_cast<uint64_t>(plane.head_stride);
  };
  if ((bits(a.keys.rows) | bits(a.values.rows)) % 16 != 0) return plan;
  const PagedPlane* const factors[] = {&a.keys.scales, &a.keys.zeros,
                                       &a.values.scales, &a.values.zeros};
  for (const PagedPlane* plane : factors) {
    if (plane->base != nullptr && bits(*plane) % 4 != 0) return plan;
  }
  const uint32_t warps = group < kAttentionWarps ? group : kAttentionWarps;
  const uint32_t heads_of_warp = (group + warps - 1) / warps;
  plan.entry = kEntries[kind][dim == 128 ? 1 : 0][heads_of_warp == 1   ? 0
                                                  : heads_of_warp == 2 ? 1
                                                                       : 2];
  plan.grid[0] = a.parts;
  plan.grid[1] = a.sequences;
  plan.grid[2] = a.kv_heads;
  plan.block_threads = warps * 32;
  plan.shared_bytes =
      2 * kAttentionTokens * (2 * row_bytes + kAttentionRowPad) +
      group * dim * 4;
  return plan;
}

inline constexpr uint32_t kMergeThreads = 256;

// A warp merges an item.
inline LaunchPlan PlanMergePartials(const PartialsMerge& merge) {
  LaunchPlan plan;
  const uint64_t blocks =
      (merge.items + kMergeThreads / 32 - 1) / (kMergeThreads / 32);
  if (merge.items == 0 || merge.parts == 0 || blocks > 0x7fffffff) return plan;
  plan.entry = "larder_merge_partials";
  plan.grid[0] = static_cast<uint32_t>(blocks);
  plan.block_threads = kMergeThreads;
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_ATTENTION_TYPES_H_
