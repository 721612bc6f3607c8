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
  // Quantised values: symbols and escapes (MergeSymbols, JoinWide), perhaps
  // predicted (Unpredict) and refined (MergeRefinement), or the nested numbers
  // of a trellis; then Reconstruct.
  kValues = 0,
  // Planes of F16Planes and Bf16Planes (MergeF16, MergeBf16).
  kLosslessF16 = 1,
  kLosslessBf16 = 2,
  // Bytes, of which the symbols are the high five bits.
  kLosslessF8 = 3,
  // Tiles of fixed rates, as they are encoded (codec/FORMAT.md, modes 16 to
  // 18), from `bytes` on, behind the exact rows. Nothing of them can fail.
  kFixedFp8 = 4,
  kFixedInt8 = 5,
  kFixedInt4 = 6,
};

constexpr bool IsFixedRate(Kvc1Content content) {
  return content >= Kvc1Content::kFixedFp8;
}

// Where the escapes of kValues are. KVC1 puts them behind the words, of which
// only the decoder knows how many there are: a client that has not decoded the
// tile has no list.
enum class Kvc1Escapes : uint32_t {
  kList = 0,  // int16, in decode order
  // Behind the words, in the code of codec/FORMAT.md; behind them the words of
  // cells, if there are any, or nothing.
  kBehindWords = 1,
  // Likewise, the first 48 bytes being in the states in which the coder ends:
  // tiles of one plane.
  kInStates = 2,
};

// A tile of tokens [first_token, first_token + tokens) of the launch's places
// and heads from first_head on. Its steps are rounds * coefficients, where
// rounds = (tokens + 31) / 32, and channel c is dim c % head_dim of head
// first_head + c / head_dim.
//
// Whatever is null or 0 is not there. Bytes, words of streams and exact rows
// may lie anywhere, numbers where their type may unless more is said; what is
// asked for in bulk is best at multiples of 32 bytes: tables, scales, means,
// angles, transforms. Streams and planes are below 2^31 bytes each.
struct Kvc1Tile {
  // 16-bit little-endian words.
  const void* words;
  // Tables, and which of them each coefficient has, and behind these the low
  // part of each that is wide; negative: none, which decodes to 0 (of lossless
  // planes: to symbol 0).
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
  // before it ended. `scratch` is room for [round][coefficient][32], at a
  // multiple of 16, where there are more planes, cells, or escapes that are not
  // listed.
  const RefineTable* refine_tables;
  const int32_t* refine_table_of;
  const void* refine_words;
  int16_t* scratch;
  // As in Prediction, of all coefficients; null: no prediction. It is of the
  // first plane's numbers, before they are refined.
  const uint16_t* order;
  const uint8_t* parent_counts;
  const uint16_t* parents;
  const int16_t* factors;
  // Lossless planes: low or raw bytes, words of bits, exponents' offsets.
  // kLosslessF8: in `bytes`, the low three bits of [head][token][dim].
  // Fixed rates: exponents, or starts and steps; then codes.
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

  // Coefficients in two parts (JoinWide). Low parts have no escapes where
  // escapes are not listed.
  const uint16_t* wide;
  uint32_t wide_count;
  // The third plane, as the second.
  uint32_t fine_word_count;
  const RefineTable* fine_tables;
  const int32_t* fine_table_of;
  const void* fine_words;
  // Nested: the first plane's numbers are differences of triples, these are the
  // cells', the second plane (if it is there) is that of numbers. Tables of
  // both by place in the order, which is REQUIRED, and none negative. The words
  // are those behind the escapes where these are not listed.
  const RefineTable* cell_tables;
  const int32_t* cell_table_of;
  const void* cell_words;
  uint32_t cell_word_count;
  Kvc1Escapes escapes_in;
  // Not kList: all that is there from `words` on; word_count is of no meaning.
  uint32_t plane_bytes;
  // What KltInputMax says: larger magnitudes are an error. 0: they are not
  // looked for.
  uint32_t klt_input_max;
  // The first so many tokens are not decoded, but copied: elements as rows have
  // them, [token][head][dim], or one element that they all are. If these are
  // all tokens, nothing else is looked at.
  const void* exact;
  uint32_t exact_rows;
  uint32_t exact_is_one;
  // Lossless planes: 1: as they are encoded, without lanes past the last token
  // (codec/FORMAT.md), `bits` of any alignment. 0: all lanes are there.
  uint32_t packed;
  // 1: every plane is there: words that are left over, or a coder that ends
  // elsewhere than an encoder begins, are an error.
  uint32_t complete;
  // Integers of fixed rates. 1: 64 tokens of a channel are a group, as keys
  // have it; 0: 64 channels of a token.
  uint32_t groups_of_tokens;
};

// What became of a tile. If ok is 0 its rows are anything, no other row was
// touched, and words_used are 0. It is 0 where states are none, words do not
// suffice, escapes are more or fewer, and where `complete` and klt_input_max
// say so; where escapes are not listed, also where bytes are left over or the
// later planes' words not used up: then just where the codec refuses the tile.
struct Kvc1TileResult {
  uint32_t ok;
  uint32_t words_used;
  uint32_t refine_words_used;
  uint32_t states[kLanes];  // where the coder ended
  uint32_t fine_words_used;
  uint32_t cell_words_used;
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
  // kF16, kBf16 or kF32; of lossless planes the one they are (kLosslessF8: any
  // fp8, as kE4m3); of fixed rates kF16 or kBf16, which starts and steps are.
  Element element;
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
// A stream's bytes on their way, of which lossless planes have three; tables of
// eight steps.
inline constexpr uint32_t kKvc1WindowBytes = 1024;
inline constexpr uint32_t kKvc1TablesBytes = 512;
// What a block may have on every device that is compiled for.
inline constexpr uint64_t kKvc1SharedMax = 96 << 10;
// Of a tile of a fixed rate a warp has every fourth 32 coded tokens: the
// codec's tiles have no more than 128.
inline constexpr uint32_t kKvc1FixedWarps = 4;
// Starts that 32 tokens have at most, or steps: one for each channel, or for
// each 64 channels of a token. A multiple of 8.
constexpr uint32_t Kvc1FixedRoom(uint32_t channels) {
  return (channels + 7) / 8 * 8 + kLanes;
}

constexpr uint64_t Kvc1SharedBytes(const Kvc1Decode& decode) {
  if (IsFixedRate(decode.content)) {
    return kKvc1WindowBytes +
           2 * sizeof(float) * uint64_t{Kvc1FixedRoom(decode.channels_max)};
  }
  const uint64_t windows = decode.content == Kvc1Content::kValues ? 1 : 3;
  const uint64_t steps =
      uint64_t{decode.coefficients_max} * kKvc1StepStride * 2;
  const uint64_t values = decode.with_klt != 0 ? uint64_t{decode.channels_max} *
                                                     kKvc1ValueStride * 4
                                               : 0;
  return windows * kKvc1WindowBytes + kKvc1TablesBytes +
         (steps + 15) / 16 * 16 + values;
}

// Whether there is a plan for such tiles; if not, the host has to decode them.
// What cannot be: tiles of more than 1,422 coefficients, or with a transform
// 483, which shared memory does not hold; of fixed rates more than
// kTileChannelsMax channels, or rotations; elements that the content is not
// made to; rotations that are none.
constexpr bool SupportsKvc1Decode(const Kvc1Decode& decode) {
  const Element e = decode.element;
  if (IsFixedRate(decode.content) &&
      (decode.channels_max > kTileChannelsMax || decode.rotary_dim != 0)) {
    return false;
  }
  const bool element =
      IsFixedRate(decode.content) ? e == Element::kF16 || e == Element::kBf16
      : decode.content == Kvc1Content::kValues
          ? e == Element::kF16 || e == Element::kBf16 || e == Element::kF32
      : decode.content == Kvc1Content::kLosslessF16  ? e == Element::kF16
      : decode.content == Kvc1Content::kLosslessBf16 ? e == Element::kBf16
                                                     : e == Element::kE4m3;
  return element && decode.head_dim != 0 && decode.coefficients_max != 0 &&
         decode.rotary_dim % 2 == 0 && decode.rotary_dim <= decode.head_dim &&
         Kvc1SharedBytes(decode) <= kKvc1SharedMax;
}

// Nothing to launch also where that is not supported.
inline LaunchPlan PlanKvc1Decode(const Kvc1Decode& decode) {
  LaunchPlan plan;
  if (decode.count == 0 || !SupportsKvc1Decode(decode)) return plan;
  constexpr const char* kEntries[] = {"larder_kvc1_decode",
                                      "larder_kvc1_decode_lossless_f16",
                                      "larder_kvc1_decode_lossless_bf16",
                                      "larder_kvc1_decode_lossless_f8",
                                      "larder_kvc1_decode_fp8",
                                      "larder_kvc1_decode_int8",
                                      "larder_kvc1_decode_int4"};
  plan.entry = kEntries[static_cast<uint32_t>(decode.content)];
  plan.grid[0] = decode.count;
  if (IsFixedRate(decode.content)) plan.grid[1] = kKvc1FixedWarps;
  plan.block_threads = 32;
  plan.shared_bytes = static_cast<uint32_t>(Kvc1SharedBytes(decode));
  return plan;
}

}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_DECODE_TYPES_H_
