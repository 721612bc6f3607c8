// As injected_attention.cu.

#include "kernels/cuda/kvc1_decode.cuh"

using larder::kernels::cuda::DecodeTiles;
using larder::kernels::cuda::Kvc1Content;
using larder::kernels::cuda::Kvc1Decode;

LARDER_KERNEL(larder_kvc1_decode, Kvc1Decode, 32) {
  DecodeTiles<Kvc1Content::kValues>(p);
}
