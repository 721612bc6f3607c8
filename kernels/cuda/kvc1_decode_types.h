#ifndef LARDER_KERNELS_CUDA_KVC1_DECODE_TYPES_H_
#define LARDER_KERNELS_CUDA_KVC1_DECODE_TYPES_H_

// KVC1 tiles, decoded on a device straight into pages: the entropy coder, what
// its symbols mean and the way to rows, in one kernel, a warp for each tile.
// The result is that of kernels/kvc1.h, to the bit. Interleaved rANS decoded by
// a warp with votes is DietGPU's scheme (Johnson, 2022); tables and words are
// KVC1's.
//
// All pointers are to device memory. Whoever fills these structs has parsed the
// tile: untrusted are words, states, escapes and their numbers, as in kvc1.h.

#include <stdint.h>

#include "kernels/cuda/launch_plan.h"
#include "kernels/kvc1_types.h"
#include "kernels/paged.h"

namespace larder::kernels::cuda {

enum class Kvc1Content : uint32_t {
  // Quantised values: symbols and escapes (MergeSymbols), perhaps refined
  // (MergeRefinement) and predicted (Unpredict), then Reconstruct.
  kValues = 0,
  // Planes of F16Planes and Bf16Planes (MergeF16, MergeBf16).
  kLosslessF16 = 1,
  kLosslessBf16 = 2,
};

// A tile of tokens [first_token, first_token + tokens) of the launch's places
// and heads from first_head on. Its steps are rounds * coefficients, where
// rounds = (tokens + 31) / 32, and channel c is dim c % head_dim of head
// first_head + c / head_dim.
struct Kvc1Tile {
  // 16-bit little-endian words, of any alignment.
  const void* words;
  // Tables, and which of them each coefficient has; negative: none, which
  // decodes to 0 (of lossless planes: to symbol 0).
  const SymbolTable* tables;
  const int32_t* table_of;
  // In decode order: int16 of kValues, uint8 of kLosslessBf16.
  const void* escapes;
  // kValues, by channel. Null: no mean is added.
  const float* scale;
  const float* mean;
  // [channel][coefficient]; null: none, and coefficients are channels.
  const int16_t* klt;
  // The second plane: null tables, there is none. Its coder begins where that
  // of the first plane ends. `scratch` is room for [round][coefficient][32].
  const RefineTable* refine_tables;
  const int32_t* refine_table_of;
  const void* refine_words;
  int16_t* scratch;
  // As in Prediction, of all coefficients; null: no prediction.
  const uint16_t* order;
  const uint8_t* parent_counts;
  const uint16_t* parents;
  const int16_t* factors;
  // Lossless planes: low or raw bytes, words of bits, exponents' offsets.
  const uint8_t* bytes;
  const uint32_t* bits;
  const uint8_t* exponent_offset;
  uint32_t word_count;
  uint32_t escape_count;
  uint32_t refine_word_count;
  uint32_t trellis;  // 1: the prediction runs along a trellis
  uint32_t coefficients;
  uint32_t channels;
  uint32_t first_head;
  uint32_t first_token;
  uint32_t tokens;
  uint32_t states[kLanes];
};

// What became of a tile. If ok is 0 (states that are none, words that do not
// suffice, another number of escapes) its rows are anything, no other row was
// touched, and words_used are 0.
struct Kvc1TileResult {
  uint32_t ok;
  uint32_t words_used;
  uint32_t refine_words_used;
  uint32_t states[kLanes];  // where the coder ended
};

struct Kvc1Decode {
  const Kvc1Tile* tiles;
  Kvc1TileResult* results;
  uint32_t count;
  Kvc1Content content;
  // The most of any tile. Shared memory is by these.
  uint32_t coefficients_max;
  uint32_t channels_max;
  uint32_t with_klt;  // 1: some tile has a transform
  uint32_t head_dim;
  PagedPlane rows;
  Element element;  // kF16, kBf16 or kF32; of lossless planes the one they are
  TokenPlaces places;
  // Positions' angles: [token][rotary_dim / 2], by the launch's tokens.
  uint32_t rotary_dim;  // even, at most head_dim; 0: no rotation
  RotaryPairs pairs;
  const float* cos;
  const float* sin;
};

// Steps lie in shared memory 34 numbers apart, transformed values 33, so that
// lanes that read channels next to each other do not meet in a bank.
inline constexpr uint32_t kKvc1StepStride = 34;
inline constexpr uint32_t kKvc1ValueStride = 33;

// Nothing to launch also where a tile would not fit into 96 KiB of shared
// memory (1,500 coefficients without transform, 480 with one).
inline LaunchPlan PlanKvc1Decode(const Kvc1Decode& decode) {
  LaunchPlan plan;
  const uint64_t steps =
      uint64_t{decode.coefficients_max} * kKvc1StepStride * 2;
  const uint64_t values = decode.with_klt != 0 ? uint64_t{decode.channels_max} *
                                                     kKvc1ValueStride * 4
                                               : 0;
  if (decode.count == 0 || steps == 0 || steps + values > 96 << 10) return plan;
  plan.entry = decode.content == Kvc1Content::kValues ? "larder_kvc1_decode"
               : decode.content == Kvc1Content::kLosslessF16
                   ? "larder_kvc1_decode_lossless_f16"
                   : "larder_kvc1_decode_lossless_bf16";
  plan.grid[0] = decode.count;
  plan.block_threads = 32;
  plan.shared_bytes = static_cast<uint32_t>((steps + 15) / 16 * 16 + values);
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_DECODE_TYPES_H_
