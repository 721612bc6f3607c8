#ifndef LARDER_KERNELS_KVC1_TYPES_H_
#define LARDER_KERNELS_KVC1_TYPES_H_

// What kernels/kvc1.h speaks of. Plain structs and C headers only: the files
// that implement the instruction-set levels are compiled for CPUs that this
// process may not run on, and an inline function of the standard library
// compiled there could be the copy that the linker keeps for all.

#include <stddef.h>
#include <stdint.h>

#include <cstddef>

#include "kernels/paged.h"

namespace larder::kernels {

// A step codes this many tokens of one channel: one symbol per lane.
inline constexpr size_t kLanes = 32;
inline constexpr uint32_t kProbabilityOne = 4096;
// Coder states are in [kStateMin, kStateEnd).
inline constexpr uint32_t kStateMin = uint32_t{1} << 12;
inline constexpr uint32_t kStateEnd = uint32_t{1} << 28;

// Symbols of quantised values: q + 15 for |q| <= 15, or kEscapeSymbol.
inline constexpr int kDirectMax = 15;
inline constexpr uint8_t kZeroSymbol = 15;
inline constexpr uint8_t kEscapeSymbol = 31;
// The symbol of r = 0 in a refinement plane.
inline constexpr uint8_t kZeroRefinement = 1;

// Head dimensions and coefficients of a tile are at most this.
inline constexpr size_t kTileChannelsMax = 1024;

// The probabilities of 32 symbols in units of 1/4096: symbol s has the slots
// from start[s] to before start[s + 1] (4096 after the last). start[0] is 0,
// and they never decrease. A symbol without a slot is never decoded and must
// not be encoded.
struct SymbolTable {
  uint16_t start[32];
};

// The probabilities of {0, 1, 2} by context: symbol 1 starts at first[c] and
// symbol 2 at second[c]. 0 < first < second < 4096.
struct RefineTable {
  uint16_t first[16];
  uint16_t second[16];
};

// A stream to decode: rounds x channels steps of 32 symbols, in that order.
struct DecodeStream {
  // 16-bit little-endian words, of any alignment and any content; there may be
  // more of them than the stream uses. Null only if there are none.
  const std::byte* words = nullptr;
  size_t words_count = 0;
  // One valid table per channel; null if the channel has no steps.
  const SymbolTable* const* tables = nullptr;
  size_t channels = 0;
  size_t rounds = 0;
  // [round][channel][32], written.
  uint8_t* symbols = nullptr;
  // What channels without a table get.
  uint8_t idle_symbol = 0;
  // Where the decoder starts (any content) and, if ok, where it ended.
  uint32_t states[kLanes] = {};
  // Out: whether the states were states and the words sufficed. If not, the
  // symbols are all idle_symbol, the states are as they were, and words_used
  // is 0.
  bool ok = false;
  size_t words_used = 0;
};

// Likewise, for a refinement plane: symbols 0, 1 and 2.
struct RefineDecodeStream {
  const std::byte* words = nullptr;
  size_t words_count = 0;
  const RefineTable* const* tables = nullptr;
  size_t channels = 0;
  size_t rounds = 0;
  // [round][channel][32]: a lane's context is the lesser of |value| and 15.
  const int8_t* context = nullptr;
  uint8_t* symbols = nullptr;
  uint8_t idle_symbol = 0;
  uint32_t states[kLanes] = {};
  bool ok = false;
  size_t words_used = 0;
};

// A stream of the nested numbers of a trellis (Nested, below), whose contexts
// follow from what was decoded before, step by step.
struct NestedDecodeStream;

// A stream to encode. What is decoded first is encoded last: the states given
// are those in which the decoder ends, and those returned are where it starts.
struct EncodeStream {
  // [round][channel][32]. REQUIRES: each has slots in its channel's table;
  // those of channels without a table are ignored.
  const uint8_t* symbols = nullptr;
  const SymbolTable* const* tables = nullptr;
  size_t channels = 0;
  size_t rounds = 0;
  // In and out; InitialStates() sets the default. REQUIRES: valid states.
  uint32_t states[kLanes] = {};
  // Room for EncodedWordsMax(channels, rounds) words of 2 bytes, of any
  // alignment. All of it may be written; the words are at its beginning.
  std::byte* words = nullptr;
  // Out.
  size_t words_count = 0;
};

struct RefineEncodeStream {
  const uint8_t* symbols = nullptr;
  const RefineTable* const* tables = nullptr;
  size_t channels = 0;
  size_t rounds = 0;
  const int8_t* context = nullptr;
  uint32_t states[kLanes] = {};
  std::byte* words = nullptr;
  size_t words_count = 0;
};

// Where the elements of a tile lie: (token, head, dim) is at
//   data + token * token_stride + head * head_stride + dim * element's size.
// No alignment is needed. Channel c is (c / head_dim, c % head_dim).
template <typename Byte>
struct BasicTileRows {
  Byte* data = nullptr;
  Element element = Element::kF16;  // or kBf16, kF32
  // Lanes past the last token are not written; where they are read (coded),
  // they repeat the last token.
  size_t tokens = 0;
  size_t heads = 0;
  size_t head_dim = 0;  // at most kTileChannelsMax
  ptrdiff_t token_stride = 0;
  ptrdiff_t head_stride = 0;
  // For rows that are written and not read soon: past the caches, where rows
  // are whole lines of 64 bytes, aligned; ordered before the return.
  bool stream = false;
  // Rows that are written may lie in any order, as in pages: token t is then
  // token_offsets[t] bytes behind `data`, and token_stride of no meaning.
  const ptrdiff_t* token_offsets = nullptr;
};
using TileRows = BasicTileRows<std::byte>;
using ConstTileRows = BasicTileRows<const std::byte>;

enum class RotaryPairs : uint8_t {
  kAdjacent,  // dims 2i and 2i + 1
  kHalves,    // dims i and i + rotary_dim / 2
};

// Rotary position embedding of the first rotary_dim dims of every head, by
// angles whose cosines and sines are at [token][rotary_dim / 2].
struct Rotary {
  size_t rotary_dim = 0;  // even, at most head_dim; 0: no rotation
  RotaryPairs pairs = RotaryPairs::kHalves;
  const float* cos = nullptr;
  const float* sin = nullptr;
};

// From quantised values to rows. All numbers are finite.
struct ReconstructTile {
  // [round][coefficient][32]; rounds follow each other at q_round_stride
  // elements (0: coefficients * 32).
  const int16_t* q = nullptr;
  size_t q_round_stride = 0;
  size_t rounds = 0;  // (tokens + 31) / 32
  size_t coefficients = 0;
  // The integer transform, [channel][coefficient]; null: there is none, and
  // coefficients is the number of channels. With one, coefficients is at most
  // kTileChannelsMax. Sums are modulo 2^32; KltInputMax says which |q| is safe.
  const int16_t* klt = nullptr;
  // By channel. No mean: nothing is added.
  const float* scale = nullptr;
  const float* mean = nullptr;
  Rotary rotary;
  TileRows rows;
};

// From rows to quantised values.
struct QuantizeTile {
  ConstTileRows rows;
  Rotary rotary;
  // By channel. No mean: nothing is subtracted.
  const float* mean = nullptr;
  // The forward transform, [coefficient][channel]; null: there is none, and
  // coefficients is the number of channels.  With one, channels are at most
  // kTileChannelsMax.
  const float* klt = nullptr;
  size_t coefficients = 0;
  // By coefficient. round_bias is in [0, 0.5]; null: 0.5 for all.
  const float* inverse_step = nullptr;
  const float* round_bias = nullptr;
  // As in ReconstructTile, written.
  int16_t* q = nullptr;
  size_t q_round_stride = 0;
  size_t rounds = 0;
};

// What the numbers of a channel are guessed from: those of a few channels that
// come before it in `order`, a permutation.
//   guess[c] = (sum over its parents of factor * q[parent] + 2048) >> 12
// where the sum is modulo 2^32 and the guess modulo 2^16.
//
// Along a trellis the channels of a token, in this order, are even or odd by
// turns that depend on all before them, from three bits that begin as 0:
//   q is odd if s is 1
//   (s, a, b) = (s ^ a, b ^ (q >> 1 & 1), s)
// and only which of the even, or of the odd, it is has to be told. That is the
// difference k in
//   guess = (sum over its parents of factor * q[parent]) >> 12
//   q = guess + 2 * k if the guess is even or odd as q is, or
//   q = guess + 1 - 2 * k, so that k tends to be a little above 0 in both
struct Prediction {
  size_t channels = 0;
  const uint16_t* order = nullptr;
  const uint8_t* parent_counts = nullptr;  // of each of the order
  const uint16_t* parents = nullptr;       // all of them
  const int16_t* factors = nullptr;
  bool trellis = false;
};

// Positions are in so many parts of the distance of neighbouring numbers.
inline constexpr int kTrellisParts = 16;
// The largest magnitude of a position.
inline constexpr int kTrellisMost = 32000;

// Numbers along a trellis can be told in two planes. A cell c holds the numbers
// 6 c - 3 .. 6 c + 2, of which three are even and three odd; three cells, the
// middle one being 3 t, are a triple t. The first plane tells triples, then
// which cell of them, the second which number of the cell. Whoever knows no
// more than the cell takes for the number what is guessed of it, held within 6
// c - 2 .. 6 c + 1, and guesses those after it from that: the estimate.
//
// With h = the sum over its parents of factor * number (or estimate) >> 11, in
// half numbers, modulo 2^16 as all that follows:
//   x = h + 32779;  n = x / 36 - 910 is the triple guessed
//   t = n + k if x % 36 >= 18, or n - k, where k is what is coded
//   c = 3 t + symbol - 1, in the context (h + 1 - 36 t, held within
//     -24 .. 23, + 24) / 3
//   estimate = (h + 1) >> 1 held within the cell
//   q = 6 c - s + 2 (symbol - 1), s as in Prediction, in the context h - 12 c +
//     2 s held within -8 .. 7, + 8
enum class Nested { kCells, kNumbers };

struct NestedDecodeStream {
  const std::byte* words = nullptr;
  size_t words_count = 0;
  // By place in the prediction's order, as symbols and contexts are; all valid.
  const RefineTable* const* tables = nullptr;
  size_t channels = 0;  // as the prediction has
  size_t rounds = 0;
  Nested nested = Nested::kCells;
  const Prediction* prediction = nullptr;
  // Rounds follow each other at `stride`. In and out: of kCells differences of
  // triples become estimates, of kNumbers estimates become numbers.
  int16_t* numbers = nullptr;
  size_t stride = 0;
  // Room for [round][channel][32].
  int8_t* context = nullptr;
  uint8_t* symbols = nullptr;
  uint8_t idle_symbol = 0;
  // As in DecodeStream; if not ok, numbers are anything.
  uint32_t states[kLanes] = {};
  bool ok = false;
  size_t words_used = 0;
};

// The planes of a tile of f16: per (round, channel, lane) the exponent field is
// the symbol; the mantissa's low 8 bits are the low byte; the bits 8 and 9 of
// the mantissa and the sign are bit `lane` of the three words of `bits`, in
// this order.
struct F16Planes {
  uint8_t* symbols = nullptr;  // [round][channel][32]
  uint8_t* low = nullptr;      // [round][channel][32]
  std::byte* bits = nullptr;   // [round][channel][3] u32, little-endian
};

// The planes of a tile of bf16: the symbol is the exponent field less the
// channel's offset if that is in 0..30, or else kEscapeSymbol, and the exponent
// is in the list of escapes; the byte is the sign (bit 7) and the mantissa.
struct Bf16Planes {
  uint8_t* symbols = nullptr;                // [round][channel][32]
  uint8_t* raw = nullptr;                    // [round][channel][32]
  const uint8_t* exponent_offset = nullptr;  // [channel]
};

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_KVC1_TYPES_H_
