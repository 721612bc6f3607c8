#include "kernels/cuda/checksum.cuh"

LARDER_KERNEL(larder_checksum, larder::kernels::cuda::Checksums,
              larder::kernels::cuda::kChecksumThreads) {
  larder::kernels::cuda::ChecksumRanges(p);
}
