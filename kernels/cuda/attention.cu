#include "kernels/cuda/attention.cuh"

using larder::kernels::DecodeAttention;
using larder::kernels::Element;
using larder::kernels::PartialsMerge;
using larder::kernels::cuda::AttendPart;
using larder::kernels::cuda::kMergeThreads;
using larder::kernels::cuda::MergeItems;

#define LARDER_ATTEND_HEADS(element, kElement, dim, heads)                  \
  LARDER_KERNEL(larder_attend_##element##_##dim##_##heads, DecodeAttention, \
                256) {                                                      \
    AttendPart<Element::kElement, dim, heads>(p);                           \
  }
#define LARDER_ATTEND(element, kElement)         \
  LARDER_ATTEND_HEADS(element, kElement, 64, 1)  \
  LARDER_ATTEND_HEADS(element, kElement, 64, 2)  \
  LARDER_ATTEND_HEADS(element, kElement, 64, 4)  \
  LARDER_ATTEND_HEADS(element, kElement, 128, 1) \
  LARDER_ATTEND_HEADS(element, kElement, 128, 2) \
  LARDER_ATTEND_HEADS(element, kElement, 128, 4)

LARDER_ATTEND(f16, kF16)
LARDER_ATTEND(bf16, kBf16)
LARDER_ATTEND(int8, kInt8)
LARDER_ATTEND(int4, kInt4)

LARDER_KERNEL(larder_merge_partials, PartialsMerge, kMergeThreads) {
  MergeItems(p);
}
