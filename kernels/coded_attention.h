#ifndef LARDER_KERNELS_CODED_ATTENTION_H_
#define LARDER_KERNELS_CODED_ATTENTION_H_

// Decode attention over KV that stays coded in memory (KVC1): tiles are decoded
// one after the other into a scratch of the caches' size, right where they are
// attended, and never written out as rows. What is read from memory is what the
// code takes, two to five bits for a number instead of sixteen.
//
// That is worth it where memory is short, or where KV is attended once:
// decoding costs several times what attending does, and is done again for every
// query token. kernels/README.md has figures.
//
// The definition is attention.h's, over the rows that kernels/kvc1.h makes of
// the tiles; results differ from it by at most twice what attention.h allows.
// They are partial results like its own: KV of which some is coded and some is
// not is attended in two calls and merged (MergePartials).

#include <stddef.h>
#include <stdint.h>

#include <cstddef>

#include "kernels/kvc1_types.h"
#include "kernels/paged.h"

namespace larder::kernels {

enum class CodedContent : uint32_t {
  kValues = 0,       // quantised: MergeSymbols and what refines it, Reconstruct
  kLosslessF16 = 1,  // MergeF16
  kLosslessBf16 = 2,  // MergeBf16
};

// A plane after the first. Its coder begins in the states in which the one
// before it ended.
struct CodedPlane {
  const std::byte* words = nullptr;
  size_t words_count = 0;
  // By coefficient; nested numbers: by place in the prediction's order. Null:
  // there is no such plane.
  const RefineTable* const* tables = nullptr;
};

// Some tokens of some heads, of K or V. Who fills it in has parsed the tile, as
// the codec's formats have it, and keeps what it points to. Untrusted, as in
// kvc1.h: words, states, escapes and their numbers. Trusted: all else.
struct CodedTile {
  CodedContent content = CodedContent::kValues;
  uint32_t tokens = 0;  // at least 1
  uint32_t heads = 0;
  uint32_t head_dim = 0;
  // The first plane, as in DecodeStream. Tables: one for each coefficient
  // (without a transform, channel), then those of the low parts of wide ones;
  // null ones decode to 0 (of lossless planes, to symbol 0).
  const std::byte* words = nullptr;
  size_t words_count = 0;
  const SymbolTable* const* tables = nullptr;
  uint32_t states[kLanes] = {};
  // In decode order: int16_t of kValues, uint8_t of kLosslessBf16.
  const void* escapes = nullptr;
  size_t escape_count = 0;

  // kValues. Applied in this order.
  const uint16_t* wide = nullptr;  // JoinWide
  size_t wide_count = 0;
  const Prediction* prediction = nullptr;  // Unpredict, unless there are cells
  CodedPlane cells;                        // Nested::kCells
  // Refinements; with cells the first is Nested::kNumbers, and the only one.
  CodedPlane finer[2];
  // As in ReconstructTile; a tile with a larger |number| than klt_input_max
  // (KltInputMax) does not decode.
  const int16_t* klt = nullptr;
  size_t coefficients = 0;  // with klt
  int klt_input_max = 32767;
  const float* scale = nullptr;
  const float* mean = nullptr;
  Rotary rotary;  // angles from the tile's first token on

  // Lossless planes, of whole rounds.
  const uint8_t* bytes = nullptr;
  const std::byte* bits = nullptr;
  const uint8_t* exponent_offset = nullptr;

  // The first so many tokens are these rows instead, [token][head][dim]. Where
  // they are all, nothing is decoded: a raw tile.
  const std::byte* exact = nullptr;
  uint32_t exact_tokens = 0;

  size_t channels() const { return size_t{heads} * head_dim; }
  size_t rounds() const { return (tokens + kLanes - 1) / kLanes; }
  // Of a round of the first plane.
  size_t steps() const {
    return (klt != nullptr ? coefficients : channels()) + wide_count;
  }
};

// K and V of the same tokens and heads. No values: V is the beginning of K's
// rows (MLA's latent).
struct CodedPiece {
  const CodedTile* keys = nullptr;
  const CodedTile* values = nullptr;
};

struct CodedAttention {
  // As in DecodeAttention.
  const void* queries = nullptr;
  int64_t query_sequence_stride = 0;
  int64_t query_head_stride = 0;
  Element query_element = Element::kF32;
  uint32_t sequences = 0;
  uint32_t query_heads = 0;
  uint32_t kv_heads = 0;
  float softmax_scale = 1;
  uint32_t key_dim = 0;
  uint32_t value_dim = 0;
  // kF16 or kBf16: what numbers are rounded to, what exact rows are made of,
  // and what lossless tiles have to be of.
  Element element = Element::kF16;
  // KV heads are in blocks of so many (fewer in the last one), those of a tile.
  uint32_t block_heads = 1;
  // Of sequence s and block of heads b, i < counts[s]:
  //   pieces[(s * CodedHeadBlocks() + b) * pieces_stride + i]
  // in any order of tokens.
  const CodedPiece* pieces = nullptr;
  uint64_t pieces_stride = 0;
  const uint32_t* counts = nullptr;
  // Part p has the pieces [p * n, p * n + n) of a sequence, n = counts[s] /
  // parts rounded up; later ones may be empty. At least 1.
  uint32_t parts = 1;
  // As in DecodeAttention. Where a piece of a part does not decode, outputs of
  // its query heads are NaN, maxima and sums are +infinity, and what they are
  // merged into is NaN.
  float* outputs = nullptr;
  float* maxima = nullptr;
  float* sums = nullptr;
  // Null, or for each of `pieces`: 1 if it was decoded, 0 if it does not decode
  // (states that are none, another number of words or escapes).
  uint8_t* decoded = nullptr;
  // CodedScratchBytes() of any alignment.
  void* scratch = nullptr;
};

constexpr uint32_t CodedHeadBlocks(uint32_t kv_heads, uint32_t block_heads) {
  return (kv_heads + block_heads - 1) / block_heads;
}

// What a call needs: for tiles of 128 tokens by 256 channels 0.7 MiB.
size_t CodedScratchBytes(const CodedAttention& attention);

// True if all pieces were decoded. Thread-safe with a scratch for each caller;
// allocates nothing, uses up to 320 KiB of stack.
bool AttendCoded(const CodedAttention& attention);

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_CODED_ATTENTION_H_
