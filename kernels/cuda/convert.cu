#include "kernels/cuda/convert.cuh"

using larder::kernels::Element;
using larder::kernels::GroupedRows;
using larder::kernels::RowsConversion;
using larder::kernels::cuda::ConvertRows;
using larder::kernels::cuda::DecodeGroupedRows;
using larder::kernels::cuda::kConvertThreads;

#define LARDER_CONVERT(from, kFrom, to, kTo)                  \
  LARDER_KERNEL(larder_convert_##from##_##to, RowsConversion, \
                kConvertThreads) {                            \
    ConvertRows<Element::kFrom, Element::kTo>(p);             \
  }
#define LARDER_CONVERT_FROM(from, kFrom)   \
  LARDER_CONVERT(from, kFrom, f16, kF16)   \
  LARDER_CONVERT(from, kFrom, bf16, kBf16) \
  LARDER_CONVERT(from, kFrom, f32, kF32)   \
  LARDER_CONVERT(from, kFrom, e4m3, kE4m3) \
  LARDER_CONVERT(from, kFrom, int8, kInt8) \
  LARDER_CONVERT(from, kFrom, int4, kInt4)

LARDER_CONVERT_FROM(f16, kF16)
LARDER_CONVERT_FROM(bf16, kBf16)
LARDER_CONVERT_FROM(f32, kF32)
LARDER_CONVERT_FROM(e4m3, kE4m3)
LARDER_CONVERT_FROM(int8, kInt8)
LARDER_CONVERT_FROM(int4, kInt4)

#define LARDER_DECODE_GROUPED(codes, kCodes, to, kTo)              \
  LARDER_KERNEL(larder_decode_grouped_##codes##_##to, GroupedRows, \
                kConvertThreads) {                                 \
    DecodeGroupedRows<Element::kCodes, Element::kTo>(p);           \
  }
#define LARDER_DECODE_GROUPED_OF(codes, kCodes)     \
  LARDER_DECODE_GROUPED(codes, kCodes, f16, kF16)   \
  LARDER_DECODE_GROUPED(codes, kCodes, bf16, kBf16) \
  LARDER_DECODE_GROUPED(codes, kCodes, f32, kF32)

LARDER_DECODE_GROUPED_OF(int8, kInt8)
LARDER_DECODE_GROUPED_OF(int4, kInt4)
