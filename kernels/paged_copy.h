#ifndef LARDER_KERNELS_PAGED_COPY_H_
#define LARDER_KERNELS_PAGED_COPY_H_

// K or V of some tokens from an engine's paged cache to where they lie in
// order, and back. Rows are bytes: what they mean does not matter here.
//
// The scalar implementation is the definition; AVX2 and AVX-512, chosen once at
// run time, do the same to the byte. Thread-safe, allocates nothing. The
// destination must not overlap the source. Nothing but the rows named is
// written: what lies between them, and the rows of tokens that are skipped, is
// as it was. Nothing but rows named is read.

#include <stdint.h>

#include "kernels/paged.h"

namespace larder::kernels {

// Rows that lie side by side on both sides are moved as one: tokens of a block
// where a head's rows follow each other (HND), heads of a token where the dense
// side is token-major (NHD). Any strides and row sizes will do; pieces that are
// whole lines of 64 bytes are the fastest.
struct PagedCopy {
  PagedPlane paged;
  DensePlane dense;
  TokenPlaces places;
  uint64_t tokens;
  uint32_t heads;
  uint32_t row_bytes;  // of one head of one token
  // For rows that are written and not read soon: past the caches, where they
  // allow it; ordered before the return.
  bool stream;
};

// Paged to dense, and dense to paged. If a scatter names a place twice, either
// row is there afterwards. REQUIRES: what Fits checks, of the memory there is.
void Gather(const PagedCopy& copy);
void Scatter(const PagedCopy& copy);

// The memory that a copy may touch.
struct PagedCopyBounds {
  const void* paged;  // where it begins
  uint64_t paged_bytes;
  uint64_t blocks;  // in it: places lie in [0, blocks)
  const void* dense;
  uint64_t dense_bytes;
};

// Is `copy` well-formed, with every place in a block that exists, and every row
// of all blocks and of all dense tokens within the memory? Counts and strides
// may be anything: no sum here overflows. `places` must be readable.
bool Fits(const PagedCopy& copy, const PagedCopyBounds& bounds);

// For what comes from elsewhere: false, and nothing touched, if it does not
// fit. `places` must not change meanwhile.
[[nodiscard]] bool TryGather(const PagedCopy& copy,
                             const PagedCopyBounds& bounds);
[[nodiscard]] bool TryScatter(const PagedCopy& copy,
                              const PagedCopyBounds& bounds);

}  // namespace larder::kernels

#endif  // LARDER_KERNELS_PAGED_COPY_H_
