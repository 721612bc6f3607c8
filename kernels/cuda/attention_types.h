#ifndef LARDER_KERNELS_CUDA_ATTENTION_TYPES_H_
#define LARDER_KERNELS_CUDA_ATTENTION_TYPES_H_

// Decode attention (kernels/attention.h) on a device, and the merge of its
// parts. All pointers are to device memory. Results differ from the definition
// by no more than attention.h allows, but twice that in `out` and `sum`:
// exponentials are the device's (ex2.approx).
//
// Groups of 4 query heads and more of f16 and bf16, but not latents, go to
// tensor cores: within the same on the executor, which sums 16 products in f32
// one by one. How devices do it is not documented; four times as much is what
// is allowed there, and no device has been measured.
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

// A group of query heads is cut into parts of as equal a size as can be, at
// most `most`: those that a block attends for.
constexpr uint32_t AttentionHeads(uint32_t group, uint32_t most) {
  const uint32_t cuts = (group + most - 1) / most;
  return (group + cuts - 1) / cuts;
}
// More at once need more shared memory than a block has; a latent's rows are
// long.
inline constexpr uint32_t kAttentionHeads = 32;
inline constexpr uint32_t kLatentHeads = 8;

// On tensor cores (attention_mma.cuh): a warp's tokens, the rows of a product,
// and what is behind rows in shared memory, again for the sake of banks.
inline constexpr uint32_t kMmaTokens = 16;
inline constexpr uint32_t kMmaRows = 16;
inline constexpr uint32_t kAttentionMmaKeyPad = 64;
inline constexpr uint32_t kAttentionMmaValuePad = 16;
// Groups that are worth it.
inline constexpr uint32_t kAttentionMmaGroup = 4;
constexpr uint32_t AttentionMmaWarps(uint32_t dim) {
  return dim == 256 ? 2 : 4;
}

// A latent (DeepSeek-AI, "DeepSeek-V2", 2024): rows of so many elements are K,
// of which the first are V.
inline constexpr uint32_t kLatentDim = 576;
inline constexpr uint32_t kLatentValueDim = 512;

// The kernels' names. Null: there is none.
struct AttentionEntries {
  Element element;
  uint32_t bits;
  uint32_t mma_parts;    // that a query is the sum of on tensor cores
  const char* of[3][3];  // 64, 128, 256 dims; 1, 2, 4 heads of a warp
  const char* mma[3];    // on tensor cores
  const char* latent;
};
#define LARDER_ATTEND(name) "larder_attend_" name
// On tensor cores groups never need more than one head of a warp.
#define LARDER_ATTEND_WIDE(name)                                   \
  {{LARDER_ATTEND(name "_64_1")},                                  \
   {LARDER_ATTEND(name "_128_1")},                                 \
   {LARDER_ATTEND(name "_256_1")}},                                \
  {                                                                \
    LARDER_ATTEND(name "_64_mma"), LARDER_ATTEND(name "_128_mma"), \
        LARDER_ATTEND(name "_256_mma")                             \
  }
#define LARDER_ATTEND_DIM(name)                         \
  {                                                     \
    LARDER_ATTEND(name "_1"), LARDER_ATTEND(name "_2"), \
        LARDER_ATTEND(name "_4")                        \
  }
#define LARDER_ATTEND_NARROW(name)                                \
  {LARDER_ATTEND_DIM(name "_64"), LARDER_ATTEND_DIM(name "_128"), \
   LARDER_ATTEND_DIM(name "_256")},                               \
  {}
inline constexpr AttentionEntries kAttentionEntries[] = {
    {Element::kF16, 16, 2, LARDER_ATTEND_WIDE("f16"),
     LARDER_ATTEND("f16_latent")},
    {Element::kBf16, 16, 3, LARDER_ATTEND_WIDE("bf16"),
     LARDER_ATTEND("bf16_latent")},
    {Element::kE4m3, 8, 0, LARDER_ATTEND_NARROW("e4m3"),
     LARDER_ATTEND("e4m3_latent")},
    {Element::kInt8, 8, 0, LARDER_ATTEND_NARROW("int8"), nullptr},
    {Element::kInt4, 4, 0, LARDER_ATTEND_NARROW("int4"), nullptr}};
#undef LARDER_ATTEND_NARROW
#undef LARDER_ATTEND_DIM
#undef LARDER_ATTEND_WIDE
#undef LARDER_ATTEND

constexpr bool SamePlane(const PagedPlane& a, const PagedPlane& b) {
  return a.base == b.base && a.block_stride == b.block_stride &&
         a.token_stride == b.token_stride && a.head_stride == b.head_stride;
}

// Nothing to launch where there is nothing to do, or where the device has no
// kernel for it: K and V of the same element, f16, bf16, e4m3, int8 or int4, of
// 64, 128 or 256 dims; or V the first 512 dims of K's rows of 576 (f16, bf16,
// e4m3). Rows and outputs at multiples of 16 bytes, queries, scales and zeros
// at multiples of their size; at most 65535 sequences, and KV heads times what
// groups are cut into.
inline LaunchPlan PlanAttention(const DecodeAttention& a) {
  LaunchPlan plan;
  if (a.sequences == 0 || a.sequences > 65535 || a.kv_heads == 0 ||
      a.query_heads == 0 || a.query_heads % a.kv_heads != 0 || a.parts == 0 ||
      a.query_element > Element::kF32 || a.keys.element != a.values.element) {
    return plan;
  }
  const AttentionEntries* entries = nullptr;
  for (const AttentionEntries& some : kAttentionEntries) {
    if (some.element == a.keys.element) entries = &some;
  }
  if (entries == nullptr) return plan;
  const uint32_t dim = a.keys.dim;
  const bool latent = dim == kLatentDim && a.values.dim == kLatentValueDim &&
                      SamePlane(a.keys.rows, a.values.rows);
  if (latent ? entries->latent == nullptr
             : (dim != 64 && dim != 128 && dim != 256) || a.values.dim != dim) {
    return plan;
  }
  const auto bits = [](const PagedPlane& plane) {
    return reinterpret_cast<uintptr_t>(plane.base) |
           static_cast<uint64_t>(plane.block_stride) |
           static_cast<uint64_t>(plane.token_stride) |
           static_cast<uint64_t>(plane.head_stride);
  };
  if ((bits(a.keys.rows) | bits(a.values.rows) |
       reinterpret_cast<uintptr_t>(a.outputs)) %
          16 !=
      0) {
    return plan;
  }
  const uint64_t query_size = a.query_element == Element::kF32 ? 4 : 2;
  if ((reinterpret_cast<uintptr_t>(a.queries) |
       static_cast<uint64_t>(a.query_sequence_stride) |
       static_cast<uint64_t>(a.query_head_stride)) %
          query_size !=
      0) {
    return plan;
  }
  const PagedPlane* const factors[] = {&a.keys.scales, &a.keys.zeros,
                                       &a.values.scales, &a.values.zeros};
  for (const PagedPlane* plane : factors) {
    if (plane->base != nullptr && bits(*plane) % 4 != 0) return plan;
  }
  const uint32_t group = a.query_heads / a.kv_heads;
  const uint32_t size = dim == 64 ? 0 : dim == 128 ? 1 : 2;
  const bool mma =
      !latent && group >= kAttentionMmaGroup && entries->mma[size] != nullptr;
  const uint32_t heads = AttentionHeads(group, mma      ? kMmaRows
                                               : latent ? kLatentHeads
                                                        : kAttentionHeads);
  const uint64_t blocks = uint64_t{a.kv_heads} * ((group + heads - 1) / heads);
  if (blocks > 65535) return plan;
  plan.grid[0] = a.parts;
  plan.grid[1] = a.sequences;
  plan.grid[2] = static_cast<uint32_t>(blocks);
  const uint32_t row_bytes = dim * entries->bits / 8;
  if (mma) {
    const uint32_t key_row = row_bytes + kAttentionMmaKeyPad;
    const uint32_t value_row = row_bytes + kAttentionMmaValuePad;
    const uint32_t warps = AttentionMmaWarps(dim);
    plan.entry = entries->mma[size];
    plan.block_threads = warps * 32;
    plan.shared_bytes = kMmaRows * (entries->mma_parts * key_row + 2 * 4) +
                        warps * 2 * kMmaTokens * (key_row + value_row);
    return plan;
  }
  const uint32_t warps = heads < kAttentionWarps ? heads : kAttentionWarps;
  const uint32_t heads_of_warp = (heads + warps - 1) / warps;
  plan.entry = latent ? entries->latent
                      : entries->of[size][heads_of_warp == 1   ? 0
                                          : heads_of_warp == 2 ? 1
                                                               : 2];
  plan.block_threads = warps * 32;
  plan.shared_bytes =
      2 * kAttentionTokens * ((latent ? 1 : 2) * row_bytes + kAttentionRowPad) +
      heads * dim * 4;
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
