// As injected_attention.cu.

#include "kernels/cuda/kvc1_fixed.cuh"

using larder::kernels::cuda::DecodeFixedTiles;
using larder::kernels::cuda::Kvc1Content;
using larder::kernels::cuda::Kvc1Decode;

LARDER_KERNEL(larder_kvc1_decode_int4, Kvc1Decode, 32) {
  DecodeFixedTiles<Kvc1Content::kFixedInt4>(p);
}
