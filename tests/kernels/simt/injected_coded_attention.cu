// As injected_attention.cu.

#include "kernels/cuda/coded_attention.cuh"

using larder::kernels::Element;
using larder::kernels::cuda::AttendCodedPart;
using larder::kernels::cuda::CodedDeviceAttention;
using larder::kernels::cuda::Kvc1Content;

LARDER_KERNEL(larder_attend_coded_f16_64, CodedDeviceAttention, 256) {
  AttendCodedPart<Kvc1Content::kValues, Element::kF16, 64>(p);
}
