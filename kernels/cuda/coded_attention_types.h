#ifndef LARDER_KERNELS_CUDA_CODED_ATTENTION_TYPES_H_
#define LARDER_KERNELS_CUDA_CODED_ATTENTION_TYPES_H_

// Decode attention over coded tiles (kernels/coded_attention.h) on a device: a
// round of 32 tokens at a time is decoded into shared memory and attended
// there. All pointers are to device memory. Results differ from the definition
// by at most twice what attention.h allows, and no order of threads changes a
// bit of them.
//
// A block has a part of a sequence's pieces for one block of KV heads. Its
// first warp decodes keys, its second values; then each warp attends the round
// for up to four query heads. All partial results stay in registers.

#include <stdint.h>

#include "kernels/coded_attention.h"
#include "kernels/cuda/kvc1_decode_types.h"
#include "kernels/cuda/launch_plan.h"

namespace larder::kernels::cuda {

// K or V of a piece. `coded` is as kvc1_decode has it, in any mode but
// kLosslessF8 and fixed rates; first_head and first_token are of no meaning.
// Where it needs a `scratch` (planes after the first, escapes that are not
// listed) its tiles are better decoded into pages: that has two bytes for every
// number.
struct CodedDeviceTile {
  Kvc1Tile coded;
  // Of the tile's first token; null: no rotation. Strides are the launch's.
  const float* cos;
  const float* sin;
};

struct CodedDeviceAttention {
  // As in CodedAttention.
  const void* queries;
  int64_t query_sequence_stride;
  int64_t query_head_stride;
  Element query_element;
  uint32_t sequences;
  uint32_t query_heads;
  uint32_t kv_heads;
  float softmax_scale;
  uint32_t dim;     // of K and V
  Element element;  // kF16 or kBf16
  // kValues, or the lossless content of the element; of all tiles that are not
  // exact as a whole.
  Kvc1Content content;
  uint32_t block_heads;
  // K and V of piece i: keys[i] and values[i].
  const CodedDeviceTile* keys;
  const CodedDeviceTile* values;
  uint64_t pieces_stride;
  const uint32_t* counts;
  uint32_t parts;
  float* outputs;
  float* maxima;
  float* sums;
  uint8_t* decoded;  // of each piece; or null
  // The most of any tile: without a transform, block_heads * dim. 1: some tile
  // has one.
  uint32_t coefficients_max;
  uint32_t with_klt;
  // Angle i of token t of a tile is cos[t * angle_token_stride + i *
  // angle_pair_stride]. A warp asks for one of 32 tokens at once, which with a
  // token stride of 1 are whole sectors.
  uint32_t rotary_dim;  // even, at most dim
  RotaryPairs pairs;
  int64_t angle_token_stride;
  int64_t angle_pair_stride;
};

inline constexpr uint32_t kCodedWarps = 8;      // at most
inline constexpr uint32_t kCodedWarpHeads = 4;  // query heads of a warp

// What a decoder of one of the tiles has to know of the launch.
constexpr Kvc1Decode CodedDecode(const CodedDeviceAttention& a) {
  Kvc1Decode decode = {};
  decode.content = a.content;
  decode.coefficients_max = a.coefficients_max;
  decode.head_dim = a.dim;
  decode.element = a.element;
  return decode;
}
constexpr uint64_t CodedRowsBytes(uint32_t rows) {
  return (uint64_t{rows} * kKvc1StepStride * 2 + 15) / 16 * 16;
}
constexpr uint64_t CodedSharedBytes(const CodedDeviceAttention& a) {
  const uint64_t rows =
      a.with_klt != 0 ? CodedRowsBytes(a.block_heads * a.dim) : 0;
  return 2 * (Kvc1SharedBytes(CodedDecode(a)) + rows) +
         uint64_t{a.block_heads} * (a.query_heads / a.kv_heads) * a.dim * 4;
}

// Nothing to launch where there is nothing to do, or where the device has no
// kernel for it: heads of 64 or 128; at most 32 query heads for a block of KV
// heads, of which each KV head's are counted in fours; at most 65535 sequences;
// what does not fit into 96 KiB of shared memory.
inline LaunchPlan PlanCodedAttention(const CodedDeviceAttention& a) {
  static const char* const kEntries[2][2][2] = {
      {{"larder_attend_coded_f16_64", "larder_attend_coded_f16_128"},
       {"larder_attend_coded_bf16_64", "larder_attend_coded_bf16_128"}},
      {{"larder_attend_coded_lossless_f16_64",
        "larder_attend_coded_lossless_f16_128"},
       {"larder_attend_coded_lossless_bf16_64",
        "larder_attend_coded_lossless_bf16_128"}}};
  LaunchPlan plan;
  const bool bf16 = a.element == Element::kBf16;
  const bool lossless = a.content != Kvc1Content::kValues;
  if (a.sequences == 0 || a.sequences > 65535 || a.kv_heads == 0 ||
      a.query_heads == 0 || a.query_heads % a.kv_heads != 0 ||
      a.block_heads == 0 || a.parts == 0 || (a.dim != 64 && a.dim != 128) ||
      (a.element != Element::kF16 && !bf16) ||
      a.query_element > Element::kF32 || a.rotary_dim % 2 != 0 ||
      a.rotary_dim > a.dim ||
      (lossless && a.content != (bf16 ? Kvc1Content::kLosslessBf16
                                      : Kvc1Content::kLosslessF16))) {
    return plan;
  }
  const uint32_t group = a.query_heads / a.kv_heads;
  const uint64_t warps = uint64_t{a.block_heads} *
                         ((group + kCodedWarpHeads - 1) / kCodedWarpHeads);
  const uint32_t blocks = CodedHeadBlocks(a.kv_heads, a.block_heads);
  const uint64_t channels = uint64_t{a.block_heads} * a.dim;
  if (warps > kCodedWarps || blocks > 65535 ||
      a.coefficients_max > kTileChannelsMax ||
      (a.with_klt == 0 && a.coefficients_max != channels) ||
      CodedSharedBytes(a) > kKvc1SharedMax) {
    return plan;
  }
  plan.entry = kEntries[lossless ? 1 : 0][bf16 ? 1 : 0][a.dim == 128 ? 1 : 0];
  plan.grid[0] = a.parts;
  plan.grid[1] = a.sequences;
  plan.grid[2] = blocks;
  plan.block_threads = (warps < 2 ? 2 : static_cast<uint32_t>(warps)) * 32;
  plan.shared_bytes = static_cast<uint32_t>(CodedSharedBytes(a));
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_CODED_ATTENTION_TYPES_H_
