#ifndef LARDER_KERNELS_ATTENTION_H_
#define LARDER_KERNELS_ATTENTION_H_

// Decode attention: one query token of each of some sequences over KV that lies
// in pages, in one piece or split, so that parts of it may be attended
// elsewhere and merged (Dao et al., "Flash-Decoding", 2023).
//
// For query head h of a sequence, over its tokens t that are not skipped, with
// the KV head g = h / (query_heads / kv_heads):
//   l[t] = softmax_scale * sum over c of q[h][c] * k[t][g][c]
//   max = the largest l;  sum = sum over t of exp(l[t] - max)
//   out[c] = sum over t of exp(l[t] - max) * v[t][g][c] / sum
// The scalar implementation does just this in double precision and is the
// definition; AVX2 and AVX-512, chosen once at run time, accumulate in single
// precision, in an order of their own. With V the largest |v| and L the largest
// softmax_scale * sum over c of |q * k|, where |x * scale| + |zero| stands for
// |x * scale + zero|, what they return differs by at most
//   V * (1 + L) * 2^-18 in out,  (1 + L) * 2^-20 in max,
//   sum * (1 + L) * 2^-18 in sum,
// over up to 2^16 tokens. (That of logits is common to all who multiply in
// single precision.) Of int8 and int4, AVX-512 rounds queries and weights to 24
// bits of the largest and goes on in integers. There L is at least the largest
// softmax_scale * sum over c of (1/8 of the largest |q|) * |k * scale|, and V
// at least the largest |scale| times 128 (int8) or 8 (int4): what they are
// anyway where rows are scaled to their elements' range and queries have no
// outliers that all keys are blind to.
//
// Elements, scales and logits are finite; where one that is read is not, the
// outputs of the query heads that read it are unspecified, others are not
// touched by it. Tokens that are skipped are not read.
//
// Thread-safe, allocates nothing, uses up to 192 KiB of stack.

#include <stdint.h>

#include "kernels/paged.h"

namespace larder::kernels {

// K or V: rows of `dim` elements of any type. An element x means
//   x * scale + zero
// of its token and head; both are f32 in planes of their own, which may lie in
// the same pages: strides of 0 share one among tokens, heads or all. A base of
// null: 1, or 0.
struct AttentionPlane {
  PagedPlane rows;
  PagedPlane scales;
  PagedPlane zeros;
  Element element;
  uint32_t dim;  // 1 .. kAttentionDimMax
};
inline constexpr uint32_t kAttentionDimMax = 1024;

// Where V is the beginning of K's rows (MLA's latent), its plane says so.
struct DecodeAttention {
  // f32, f16 or bf16: head h of sequence s from
  //   queries + s * query_sequence_stride + h * query_head_stride (bytes).
  const void* queries;
  int64_t query_sequence_stride;
  int64_t query_head_stride;
  Element query_element;
  uint32_t sequences;
  uint32_t query_heads;  // a multiple of kv_heads
  uint32_t kv_heads;
  float softmax_scale;
  AttentionPlane keys;
  AttentionPlane values;
  // Of sequence s: lengths[s] tokens, whose places begin at
  // places.places + s * places_stride (int64s).
  TokenPlaces places;
  uint64_t places_stride;
  const uint32_t* lengths;
  // The tokens of a sequence are cut into so many parts of whole blocks, as
  // PartTokens has it; later ones may be empty. At least 1.
  uint32_t parts;
  // Written: [part][sequence][query head][values.dim], and [part][sequence]
  // [query head]. Of an empty part, or where all is skipped: 0, -infinity and
  // 0. With one part `outputs` is the result.
  float* outputs;
  float* maxima;
  float* sums;
};
void Attend(const DecodeAttention& attention);

// How many tokens each but the last part of so many has.
constexpr uint64_t PartTokens(uint64_t tokens, uint32_t block_tokens,
                              uint32_t parts) {
  const uint64_t blocks = (tokens + block_tokens - 1) / block_tokens;
  return (blocks + parts - 1) / parts * block_tokens;
}

// Partial results over disjoint tokens, of the same queries, to one: with m the
// largest of the maxima and w[p] = sums[p] * exp(maxima[p] - m),
//   sum = sum over p of w[p];  output = sum over p of w[p] * outputs[p] / sum
// Parts whose sum is 0 are not looked at; if all are: 0, -infinity and 0. The
// inputs are [part][item][dim] and [part][item], where an item is what
// attention has as (sequence, query head). The result may lie where a part
// does. Single precision at all levels, w in double.
struct PartialsMerge {
  const float* outputs;
  const float* maxima;
  const float* sums;
  uint64_t parts;
  uint64_t items;
  uint32_t dim;
  float* output;  // [item][dim]
  float* max;     // [item], or null
  float* sum;     // [item], or null
};
void MergePartials(const PartialsMerge& merge);

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_ATTENTION_H_
