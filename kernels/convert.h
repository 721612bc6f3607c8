#ifndef LARDER_KERNELS_CONVERT_H_
#define LARDER_KERNELS_CONVERT_H_

// Rows of elements of one type to rows of another, and numbers in groups with a
// scale and a zero to rows.
//
// Every function has one defined result, to the bit: the scalar implementation
// is the definition, AVX2 and AVX-512, chosen once at run time, equal it.
// Single precision, rounded to nearest even operation by operation, none fused;
// the caller leaves the floating-point environment as it is by default.
// Thread-safe, allocates nothing. No alignment is needed. Nothing overlaps, but
// a destination may be its source where elements and strides are the same.
// Only the rows' own bytes are read and written; of the last byte of an odd
// number of int4 the high half is written as 0.

#include <stdint.h>

#include "kernels/paged.h"

namespace larder::kernels {

// For each element x of row r, in this order:
//   y = float(x), exact; int4 and int8 are in two's complement
//   y = y * scales[r / rows_per_scale % scale_count], if there are scales
//   y is rounded to the destination's element, to nearest even, where
//   - f16 and bf16 overflow to infinity, as IEEE 754 has it; a NaN stays one:
//     quiet, with its sign and the upper part of its payload
//   - f32 takes y as it is (a NaN as multiplication leaves it: that it is one
//     is all that is defined where there are scales)
//   - e4m3 saturates: what is beyond 448 and infinities are +-448; NaN is 0x7f
//     with its sign
//   - int8 and int4 saturate to -128..127 and -8..7; NaN is 0.
// Scales may be any numbers, infinities and NaNs too.
struct RowsConversion {
  const void* src;
  int64_t src_stride;  // bytes from row to row
  void* dst;
  int64_t dst_stride;
  Element src_element;
  Element dst_element;
  uint64_t rows;
  uint32_t width;  // elements of a row
  // To quantise, these are the inverses of steps. Null: none. The pair of
  // counts makes scales of rows (1, rows), of heads in [token][head] (1, heads)
  // or in [head][token] (tokens, heads), or of all (1, 1). Neither may be 0 if
  // there are scales.
  const float* scales;
  uint64_t rows_per_scale;
  uint64_t scale_count;
};
void Convert(const RowsConversion& conversion);

// Rows from unsigned numbers in groups, as KIVI has them (Liu et al., "KIVI: A
// Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024): of keys a
// group is some tokens of one channel, of values some channels of one token.
// For each channel c of token t, in this order:
//   g = t / tokens_per_group * groups_per_row + c / channels_per_group
//   y = float(code) * scales[g];  y = y + zeros[g]
//   y is stored as Convert does.
struct GroupedRows {
  const void*
      codes;  // kInt8: 0..255; kInt4: 0..15, the earlier in the low half
  int64_t codes_stride;
  Element code_element;  // kInt8 or kInt4
  void* dst;
  int64_t dst_stride;
  Element dst_element;  // kF16, kBf16 or kF32
  uint64_t tokens;
  uint32_t channels;
  uint32_t tokens_per_group;    // not 0
  uint32_t channels_per_group;  // not 0
  uint32_t groups_per_row;
  const float* scales;
  const float* zeros;
};
void DecodeGrouped(const GroupedRows& rows);

// Of a row of so many elements, in bytes.
constexpr uint64_t RowBytes(Element element, uint32_t width) {
  switch (element) {
    case Element::kF32:
      return uint64_t{width} * 4;
    case Element::kF16:
    case Element::kBf16:
      return uint64_t{width} * 2;
    case Element::kE4m3:
    case Element::kInt8:
      return width;
    case Element::kInt4:
      return (uint64_t{width} + 1) / 2;
  }
  return 0;
}

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_CONVERT_H_
