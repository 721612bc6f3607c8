// As injected_attention.cu.

#include "kernels/cuda/paged_copy.cuh"

using larder::kernels::cuda::CopyRows;
using larder::kernels::cuda::kPagedCopyThreads;
using larder::kernels::cuda::PagedCopies;

LARDER_KERNEL(larder_paged_gather_16, PagedCopies, kPagedCopyThreads) {
  CopyRows<16, true>(p);
}
