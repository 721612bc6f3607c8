#ifndef LARDER_KERNELS_CUDA_KVC1_ENCODE_TYPES_H_
#define LARDER_KERNELS_CUDA_KVC1_ENCODE_TYPES_H_

// KVC1 tiles, encoded on a device straight from pages: what kernels/kvc1.h has
// of an encoder, from rows to words, in one kernel, a warp for each tile.
// Words, escapes and planes are the same to the bit. Tables, steps, means,
// transforms and predictions are the caller's, who chooses them on the host.
//
// All pointers are to device memory. Whoever fills these structs is trusted,
// but for elements, which may be anything, and for rooms, which may be too
// small.

#include <stdint.h>

#include "kernels/cuda/launch_plan.h"
#include "kernels/kvc1_types.h"
#include "kernels/paged.h"

namespace larder::kernels::cuda {

enum class Kvc1Source : uint32_t {
  // Quantize; SearchTrellis; SplitRefinement; Predict, or for the nested
  // numbers
  // of a trellis SplitNumbers and SplitCells; SplitWide; SplitSymbols; Encode.
  kValues = 0,
  // SplitF16 and SplitBf16; Encode.
  kLosslessF16 = 1,
  kLosslessBf16 = 2,
};

// A tile of tokens [first_token, first_token + tokens) of the launch's places
// and heads from first_head on. Its steps are rounds * coefficients, where
// rounds = (tokens + 31) / 32, and channel c is dim c % head_dim of head
// first_head + c / head_dim. The elements of a token that has no place (it is
// negative) count as 0.
struct Kvc1EncodeTile {
  // Tables, and which of them each coefficient has, and behind these the low
  // part of each that is wide; negative: none, and its symbols are left out.
  const SymbolTable* tables;
  const int32_t* table_of;
  // kValues, as in QuantizeTile; mean, klt and round_bias may be null.
  const float* mean;
  const float* klt;
  const float* inverse_step;
  const float* round_bias;
  // The second plane: null tables, there is none. It is encoded first, and the
  // first plane then goes on from its states. `scratch` is room for
  // [round][coefficient][32].
  const RefineTable* refine_tables;
  const int32_t* refine_table_of;
  int16_t* scratch;
  // As in Prediction, of all coefficients, of the first plane's numbers; null:
  // no prediction. Along a trellis numbers are what SearchTrellis makes of
  // positions.
  const uint16_t* order;
  const uint8_t* parent_counts;
  const uint16_t* parents;
  const int16_t* factors;
  // Nested: the second plane is that of numbers, these are the cells', and the
  // first plane has differences of triples. Tables of both by place in the
  // order, and none negative. Null: not nested. REQUIRES: a trellis, and a
  // second plane.
  const RefineTable* cell_tables;
  const int32_t* cell_table_of;
  // Coefficients whose numbers are coded in two parts, the low ones after all
  // coefficients of the round.
  const uint16_t* wide;
  // kLosslessBf16, by channel.
  const uint8_t* exponent_offset;
  // Rooms, of which only the end is written: words (16-bit, little-endian) and
  // escapes (int16 of kValues, uint8 of kLosslessBf16) come last to first, and
  // the first of them lies where the room's size less their number says. Rooms
  // of words begin at multiples of 32 bytes and are multiples of 16 words.
  uint16_t* words;
  void* escapes;
  uint16_t* refine_words;
  uint16_t* cell_words;
  // Lossless planes: low or raw bytes (at a multiple of 16), words of bits.
  uint8_t* bytes;
  uint32_t* bits;
  uint32_t word_room;
  uint32_t escape_room;
  uint32_t refine_word_room;
  uint32_t cell_word_room;
  uint32_t wide_count;
  uint32_t trellis;  // 1: the prediction runs along a trellis
  uint32_t coefficients;
  uint32_t channels;
  uint32_t first_head;
  uint32_t first_token;
  uint32_t tokens;  // at least 1
  // kValues: the numbers (and along a trellis, differences) of tokens before
  // this one, and of lanes past the last token, are 0, as the codec has it of
  // rows that it keeps exactly.
  uint32_t first_coded;
  // kValues in one plane, 1: the states in which a decoder ends are made of the
  // first escapes, as the codec has it, and `states` is not looked at. Needs
  // `scratch`, for wide numbers too.
  uint32_t seeded;
  uint32_t states[kLanes];  // in which a decoder ends
};

// What became of a tile.
struct Kvc1EncodeResult {
  // 1: everything is there. 0: numbers are not finite, rooms are too small, or
  // a symbol has no slots in its table; rooms then hold anything.
  uint32_t ok;
  // As Quantize returns it, and LargestMagnitude of its numbers (that a
  // transform or trellis has limits is the caller's to compare).
  uint32_t finite;
  uint32_t largest;
  // How many there are; also where rooms are too small, which is how a caller
  // learns what it takes (of words of a seeded tile, once its escapes fit).
  uint32_t word_count;
  uint32_t escape_count;
  uint32_t refine_word_count;
  uint32_t cell_word_count;
  uint32_t states[kLanes];  // where a decoder begins
};

struct Kvc1Encode {
  const Kvc1EncodeTile* tiles;
  Kvc1EncodeResult* results;
  uint32_t count;
  Kvc1Source source;
  // The most of any tile; of coefficients, those that are wide count twice.
  // Shared memory is by these.
  uint32_t coefficients_max;
  uint32_t channels_max;
  uint32_t with_klt;      // 1: some tile has a transform
  uint32_t with_trellis;  // 1: some tile has a trellis
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

// What a block has of shared memory, in this order. Numbers lie 34 apart and
// floats 33, so that lanes that have channels next to each other seldom meet in
// a bank.
inline constexpr uint32_t kEncodeNumberStride = 34;
inline constexpr uint32_t kEncodeFloatStride = 33;
inline constexpr uint32_t kEncodeRingWords = 512;
struct Kvc1EncodeRoom {
  uint32_t numbers, floats, rest, bytes;  // where they begin; the whole
};
#if defined(__CUDACC__)
__host__ __device__
#endif
    inline Kvc1EncodeRoom
    RoomOf(const Kvc1Encode& encode) {
  const uint32_t n = encode.coefficients_max;
  Kvc1EncodeRoom room;
  room.numbers = kEncodeRingWords * 2;
  room.floats = room.numbers + (n * kEncodeNumberStride * 2 + 15) / 16 * 16;
  room.rest = room.floats;
  if (encode.with_klt != 0) {
    room.rest += (encode.channels_max * kEncodeFloatStride * 4 + 15) / 16 * 16;
  }
  // A trellis' ways by number and lane, or f16's words of bits.
  room.bytes = room.rest;
  if (encode.with_trellis != 0) room.bytes += n * kLanes;
  if (encode.source == Kvc1Source::kLosslessF16) room.bytes += n * 12;
  return room;
}

// Nothing to launch also where a tile would not fit into 96 KiB of shared
// memory (1,024 coefficients without transform and trellis, 478 with a
// transform).
inline LaunchPlan PlanKvc1Encode(const Kvc1Encode& encode) {
  LaunchPlan plan;
  if (encode.count == 0 || encode.coefficients_max == 0 ||
      encode.coefficients_max > kTileChannelsMax ||
      encode.channels_max > kTileChannelsMax) {
    return plan;
  }
  const Kvc1EncodeRoom room = RoomOf(encode);
  if (room.bytes > 96 << 10) return plan;
  plan.entry = encode.source == Kvc1Source::kValues ? "larder_kvc1_encode"
               : encode.source == Kvc1Source::kLosslessF16
                   ? "larder_kvc1_encode_lossless_f16"
                   : "larder_kvc1_encode_lossless_bf16";
  plan.grid[0] = encode.count;
  plan.block_threads = 32;
  plan.shared_bytes = room.bytes;
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_ENCODE_TYPES_H_
