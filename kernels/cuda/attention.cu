#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_mma.cuh"

using larder::kernels::DecodeAttention;
using larder::kernels::Element;
using larder::kernels::PartialsMerge;
using larder::kernels::cuda::AttendPart;
using larder::kernels::cuda::AttendPartMma;
using larder::kernels::cuda::kLatentDim;
using larder::kernels::cuda::kLatentValueDim;
using larder::kernels::cuda::kMergeThreads;
using larder::kernels::cuda::MergeItems;

#define LARDER_ATTEND_HEADS(element, kElement, dim, heads)                  \
  LARDER_KERNEL(larder_attend_##element##_##dim##_##heads, DecodeAttention, \
                256) {                                                      \
    AttendPart<Element::kElement, dim, heads>(p);                           \
  }
#define LARDER_ATTEND_MMA(element, kElement, dim)                              \
  LARDER_KERNEL(larder_attend_##element##_##dim##_mma, DecodeAttention, 128) { \
    AttendPartMma<Element::kElement, dim>(p);                                  \
  }
#define LARDER_ATTEND_LATENT(element, kElement)                             \
  LARDER_KERNEL(larder_attend_##element##_latent, DecodeAttention, 256) {   \
    AttendPart<Element::kElement, kLatentDim, 1, kLatentValueDim, true>(p); \
  }
// As attention_types.h names them.
#define LARDER_ATTEND_WIDE(element, kElement)    \
  LARDER_ATTEND_HEADS(element, kElement, 64, 1)  \
  LARDER_ATTEND_HEADS(element, kElement, 128, 1) \
  LARDER_ATTEND_HEADS(element, kElement, 256, 1) \
  LARDER_ATTEND_MMA(element, kElement, 64)       \
  LARDER_ATTEND_MMA(element, kElement, 128)      \
  LARDER_ATTEND_MMA(element, kElement, 256)      \
  LARDER_ATTEND_LATENT(element, kElement)
#define LARDER_ATTEND_NARROW(element, kElement)  \
  LARDER_ATTEND_HEADS(element, kElement, 64, 1)  \
  LARDER_ATTEND_HEADS(element, kElement, 64, 2)  \
  LARDER_ATTEND_HEADS(element, kElement, 64, 4)  \
  LARDER_ATTEND_HEADS(element, kElement, 128, 1) \
  LARDER_ATTEND_HEADS(element, kElement, 128, 2) \
  LARDER_ATTEND_HEADS(element, kElement, 128, 4) \
  LARDER_ATTEND_HEADS(element, kElement, 256, 1) \
  LARDER_ATTEND_HEADS(element, kElement, 256, 2) \
  LARDER_ATTEND_HEADS(element, kElement, 256, 4)

LARDER_ATTEND_WIDE(f16, kF16)
LARDER_ATTEND_WIDE(bf16, kBf16)
LARDER_ATTEND_NARROW(e4m3, kE4m3)
LARDER_ATTEND_LATENT(e4m3, kE4m3)
LARDER_ATTEND_NARROW(int8, kInt8)
LARDER_ATTEND_NARROW(int4, kInt4)

LARDER_KERNEL(larder_merge_partials, PartialsMerge, kMergeThreads) {
  MergeItems(p);
}
