#include "kernels/cuda/paged_copy.cuh"

using larder::kernels::cuda::CopyRows;
using larder::kernels::cuda::kPagedCopyThreads;
using larder::kernels::cuda::PagedCopies;

#define LARDER_PAGED_COPY(bytes)                                               \
  LARDER_KERNEL(larder_paged_gather_##bytes, PagedCopies, kPagedCopyThreads) { \
    CopyRows<bytes, true>(p);                                                  \
  }                                                                            \
  LARDER_KERNEL(larder_paged_scatter_##bytes, PagedCopies,                     \
                kPagedCopyThreads) {                                           \
    CopyRows<bytes, false>(p);                                                 \
  }

LARDER_PAGED_COPY(1)
LARDER_PAGED_COPY(2)
LARDER_PAGED_COPY(4)
LARDER_PAGED_COPY(8)
LARDER_PAGED_COPY(16)
