#include "kernels/cuda/kvc1_decode.cuh"
#include "kernels/cuda/kvc1_fixed.cuh"

using larder::kernels::cuda::DecodeFixedTiles;
using larder::kernels::cuda::DecodeTiles;
using larder::kernels::cuda::Kvc1Content;
using larder::kernels::cuda::Kvc1Decode;

LARDER_KERNEL(larder_kvc1_decode, Kvc1Decode, 32) {
  DecodeTiles<Kvc1Content::kValues>(p);
}
LARDER_KERNEL(larder_kvc1_decode_lossless_f16, Kvc1Decode, 32) {
  DecodeTiles<Kvc1Content::kLosslessF16>(p);
}
LARDER_KERNEL(larder_kvc1_decode_lossless_bf16, Kvc1Decode, 32) {
  DecodeTiles<Kvc1Content::kLosslessBf16>(p);
}
LARDER_KERNEL(larder_kvc1_decode_lossless_f8, Kvc1Decode, 32) {
  DecodeTiles<Kvc1Content::kLosslessF8>(p);
}
LARDER_KERNEL(larder_kvc1_decode_fp8, Kvc1Decode, 32) {
  DecodeFixedTiles<Kvc1Content::kFixedFp8>(p);
}
LARDER_KERNEL(larder_kvc1_decode_int8, Kvc1Decode, 32) {
  DecodeFixedTiles<Kvc1Content::kFixedInt8>(p);
}
LARDER_KERNEL(larder_kvc1_decode_int4, Kvc1Decode, 32) {
  DecodeFixedTiles<Kvc1Content::kFixedInt4>(p);
}
