#ifndef LARDER_KERNELS_KVC1_H_
#define LARDER_KERNELS_KVC1_H_

// The data-parallel half of the KVC1 codec: the entropy coder, and the way
// between rows of a KV cache and small integers. It knows neither objects nor
// profiles; the codec does.
//
// Every function has one defined result, to the bit, whatever the CPU: the
// scalar implementation is the definition, and AVX2 and AVX-512, chosen once at
// run time, equal it. Floating-point operations are single precision, rounded
// to nearest even one by one; none is fused. The caller leaves the
// floating-point environment as it is by default (no flushing of denormals).
//
// All functions are thread-safe and allocate nothing. Nothing here overlaps in
// memory unless said. Violated REQUIRES are undefined; what comes from outside
// (words, states, escapes, symbols) may be anything.

#include <array>
#include <span>

#include "kernels/kvc1_types.h"

namespace larder::kernels {

// --- Entropy coder -----------------------------------------------------------
//
// rANS with 32 interleaved lanes, probabilities in 1/4096, states in [2^12,
// 2^28) and 16-bit words, one sequence of words for all lanes. A step decodes
// one symbol per lane with one table:
//
//   slot = x & 4095;  s = the last symbol with start[s] <= slot
//   f = start[s + 1] - start[s];  x = f * (x >> 12) + slot - start[s]
//   if x < 2^12:  x = x << 16 | the next word
//
// where lanes take their words in the order 0..31. Encoding is the reverse.
//
// Both directions are bound by latency: give at least four streams to a call,
// of similar size.

bool IsValid(const SymbolTable& table);
bool IsValid(const RefineTable& table);

// The states of a decoder that has ended where a default encoder began.
constexpr std::array<uint32_t, kLanes> InitialStates() {
  std::array<uint32_t, kLanes> states{};
  for (uint32_t& state : states) state = kStateMin;
  return states;
}

// Decodes each stream by itself; see DecodeStream for what a bad one yields. A
// caller that wants to know whether a stream was intact compares words_used and
// states with what they should be.
void Decode(std::span<DecodeStream> streams);
// A refinement plane that is chained to its base starts from the states in
// which the base ended.
void Decode(std::span<RefineDecodeStream> streams);

// Those of nested numbers are chained alike: the triples that a DecodeStream
// told become cells, cells numbers.
void Decode(std::span<NestedDecodeStream> streams);

void Encode(std::span<EncodeStream> streams);
// A chained plane is encoded first; its base then continues from its states.
void Encode(std::span<RefineEncodeStream> streams);

// The room an encoder needs, in words.
constexpr size_t EncodedWordsMax(size_t channels, size_t rounds) {
  return channels * rounds * kLanes;
}

// --- Tiles -------------------------------------------------------------------

// For each token and channel c of the tile, in this order:
//   v = q[c], or the sum over coefficients k of klt[c][k] * q[k], exact
//   y = float(v) * scale[c];  y = y + mean[c], if there is a mean
//   pairs (a, b) of the rotary dims become
//     (a * cos - b * sin, a * sin + b * cos)
//   y is rounded to the element type, to nearest even, and stored.
// REQUIRES: numbers are finite; products may overflow, to infinities and NaNs.
void Reconstruct(const ReconstructTile& tile);

// The largest m <= 32767 such that no sum overflows while |q| <= m.
int KltInputMax(const int16_t* klt, size_t channels, size_t coefficients);

// For each token and channel, in this order:
//   y = the element
//   pairs (a, b) of the rotary dims become
//     (a * cos + b * sin, b * cos - a * sin)
//   y = y - mean[c], if there is a mean
//   z[k] = y[k], or 0 + klt[k][0] * y[0] + klt[k][1] * y[1] + ... from the left
//   t = z * inverse_step[k]
//   q[k] = sign(t) * floor(min(|t| + round_bias[k], 32767)); 0 if t is NaN
// Returns false if any t was an infinity or a NaN, as it is where an element
// is; the tile should then be kept another way. REQUIRES: there are tokens if
// there are rounds; all but the elements is finite.
[[nodiscard]] bool Quantize(const QuantizeTile& tile);

// --- Values and symbols ------------------------------------------------------
//
// `steps` is rounds * channels: arrays have steps * 32 elements. Lists are in
// decode order: by round, channel, lane.

// Symbols of q; what needs an escape (|q| > 15) is appended to `escapes` while
// there is room. Returns how many there are, of which the first escapes.size()
// were stored.
size_t SplitSymbols(const int16_t* q, size_t steps, uint8_t* symbols,
                    std::span<int16_t> escapes);
// The inverse. False if the symbols hold another number of escapes than
// `escapes`; q then is garbage, but initialised. Symbols above 31 count as 31.
[[nodiscard]] bool MergeSymbols(const uint8_t* symbols, size_t steps,
                                std::span<const int16_t> escapes, int16_t* q);

// q = 3 * base + r with r in {-1, 0, 1}: base is q / 3 rounded to nearest. The
// refinement symbol is 1 + r, or 1 - r where base < 0; the context is the
// lesser of |base| and 15. `base` may be q itself.
void SplitRefinement(const int16_t* q, size_t steps, int16_t* base,
                     uint8_t* symbols, int8_t* context);
// The context of a base plane, for the decoder.
void RefinementContext(const int16_t* base, size_t steps, int8_t* context);
// The inverse, modulo 2^16. Symbols above 2 are a REQUIRES. `q` may be `base`.
void MergeRefinement(const int16_t* base, const uint8_t* symbols, size_t steps,
                     int16_t* q);

// Numbers as differences to what is predicted of them, modulo 2^16, and back,
// in place. Rounds follow each other at `stride` elements, differences at
// `out_stride`.
void Predict(const Prediction& prediction, const int16_t* q, size_t rounds,
             size_t stride, int16_t* differences, size_t out_stride);
void Unpredict(const Prediction& prediction, size_t rounds, size_t stride,
               int16_t* q);

// Of a token's positions the nearest numbers that a trellis allows: the sum of
// squared distances is the least there is. Of several such, and as the sum is
// of whole parts, the one that is found as follows. Each of the eight states
// (s, a, b) of a channel is reached from two, of which b = 1 is taken if its
// sum is smaller; after the last channel, the state s + 2a + 4b that is the
// first with the smallest sum. A number j mod 4 is at the distance
//   ((position - 16 j + 32) mod 64) - 32
// In place. Rounds follow each other at `stride`.
// REQUIRES: |positions| <= kTrellisMost; at most kTileChannelsMax channels.
void SearchTrellis(const Prediction& prediction, size_t rounds, size_t stride,
                   int16_t* positions);

// Numbers along a trellis in two planes (Nested), to be encoded: for each round
// differences of triples, at `out_stride`; of cells and of numbers the symbols
// and contexts, [round][place in the order][32]. `estimates` is room for the
// numbers of one round.
// REQUIRES: q is what the trellis allows; |q| <= kTrellisMost.
void SplitCells(const Prediction& prediction, const int16_t* q, size_t rounds,
                size_t stride, int16_t* estimates, int16_t* differences,
                size_t out_stride, uint8_t* symbols, int8_t* context);
void SplitNumbers(const Prediction& prediction, const int16_t* q, size_t rounds,
                  size_t stride, uint8_t* symbols, int8_t* context);

// Numbers of the channels `wide` in two parts, 16 * high + low with low in
// -8..7: high in place, low to [i][32]. And back, modulo 2^16. One round.
void SplitWide(std::span<const uint16_t> wide, int16_t* round, int16_t* low);
void JoinWide(std::span<const uint16_t> wide, int16_t* round,
              const int16_t* low);

// --- Measures ----------------------------------------------------------------

// The largest |q|.
int LargestMagnitude(const int16_t* q, size_t steps);
// Of each channel of [round][channel][32]: the sums of numbers, of their
// squares, and of their distances from `centre`. REQUIRES: |q| <= 32767, and so
// for the centres.
void ChannelSums(const int16_t* q, size_t channels, size_t rounds, int64_t* sum,
                 int64_t* squares);
void ChannelDeviations(const int16_t* q, size_t channels, size_t rounds,
                       const int32_t* centre, int64_t* deviation);
// Of each channel of 16-bit rows: the sum of (bits >> shift & mask), modulo
// 2^32; and how often each (bits >> shift & 31) is there, as [channel][32].
// REQUIRES: no more than 32767 tokens.
void FieldSums(const ConstTileRows& rows, int shift, int mask, uint32_t* sum);
void FieldCounts(const ConstTileRows& rows, int shift, int16_t* counts);
// The largest (bits & 0x7fff) of 16-bit rows: which is the largest magnitude.
uint16_t LargestBits(const ConstTileRows& rows);
// The largest |a - b|, infinity if there is a NaN. REQUIRES: the same shape,
// and both of f16 or both of bf16.
float MaxError(const ConstTileRows& a, const ConstTileRows& b);

// --- Elements ----------------------------------------------------------------

// Elements as floats, [token][channel], exactly; and floats as elements,
// rounded to nearest even. Of a NaN only that it is one is defined. REQUIRES:
// there is room for kFloatsPad floats behind the last one, which may be read
// and written.
inline constexpr size_t kFloatsPad = 16;
void ToFloats(const ConstTileRows& rows, float* floats);
void FromFloats(const float* floats, const TileRows& rows);

// --- Lossless ----------------------------------------------------------------

// Splits rows of f16 into planes. REQUIRES: rows.element is kF16, there are
// tokens if there are rounds.
void SplitF16(const ConstTileRows& rows, size_t rounds,
              const F16Planes& planes);
// The inverse. Symbols are taken modulo 32.
void MergeF16(const F16Planes& planes, size_t rounds, const TileRows& rows);

// Splits rows of bf16; `escapes` and the result as in SplitSymbols.
size_t SplitBf16(const ConstTileRows& rows, size_t rounds,
                 const Bf16Planes& planes, std::span<uint8_t> escapes);
// The inverse. False if the symbols hold another number of escapes; the rows
// then are garbage, but initialised. Exponents are modulo 256; symbols above 31
// count as 31.
[[nodiscard]] bool MergeBf16(const Bf16Planes& planes, size_t rounds,
                             std::span<const uint8_t> escapes,
                             const TileRows& rows);

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_KVC1_H_
