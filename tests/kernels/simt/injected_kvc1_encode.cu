// As injected_attention.cu.

#include "kernels/cuda/kvc1_encode.cuh"

using larder::kernels::cuda::EncodeTiles;
using larder::kernels::cuda::Kvc1Encode;
using larder::kernels::cuda::Kvc1Source;

LARDER_KERNEL(larder_kvc1_encode, Kvc1Encode, 32) {
  EncodeTiles<Kvc1Source::kValues>(p);
}
