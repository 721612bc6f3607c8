#include "kernels/cuda/coded_attention.cuh"

using larder::kernels::Element;
using larder::kernels::cuda::AttendCodedPart;
using larder::kernels::cuda::CodedDeviceAttention;
using larder::kernels::cuda::Kvc1Content;

#define LARDER_ATTEND_CODED(name, kContent, kElement, dim)                \
  LARDER_KERNEL(larder_attend_coded_##name##_##dim, CodedDeviceAttention, \
                256) {                                                    \
    AttendCodedPart<Kvc1Content::kContent, Element::kElement, dim>(p);    \
  }

LARDER_ATTEND_CODED(f16, kValues, kF16, 64)
LARDER_ATTEND_CODED(f16, kValues, kF16, 128)
LARDER_ATTEND_CODED(bf16, kValues, kBf16, 64)
LARDER_ATTEND_CODED(bf16, kValues, kBf16, 128)
LARDER_ATTEND_CODED(lossless_f16, kLosslessF16, kF16, 64)
LARDER_ATTEND_CODED(lossless_f16, kLosslessF16, kF16, 128)
LARDER_ATTEND_CODED(lossless_bf16, kLosslessBf16, kBf16, 64)
LARDER_ATTEND_CODED(lossless_bf16, kLosslessBf16, kBf16, 128)
