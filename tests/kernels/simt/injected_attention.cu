// The kernels that tests of injected bugs launch, and no others: each bug is
// compiled for itself.

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_mma.cuh"

using larder::kernels::DecodeAttention;
using larder::kernels::Element;
using larder::kernels::PartialsMerge;
using larder::kernels::cuda::AttendPart;
using larder::kernels::cuda::AttendPartMma;
using larder::kernels::cuda::kMergeThreads;
using larder::kernels::cuda::MergeItems;

LARDER_KERNEL(larder_attend_f16_64_1, DecodeAttention, 256) {
  AttendPart<Element::kF16, 64, 1>(p);
}
LARDER_KERNEL(larder_attend_f16_64_mma, DecodeAttention, 128) {
  AttendPartMma<Element::kF16, 64>(p);
}
LARDER_KERNEL(larder_merge_partials, PartialsMerge, kMergeThreads) {
  MergeItems(p);
}
