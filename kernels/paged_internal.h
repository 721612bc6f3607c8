#ifndef LARDER_KERNELS_PAGED_INTERNAL_H_
#define LARDER_KERNELS_PAGED_INTERNAL_H_

// The instruction-set levels behind kernels/paged_copy.h, convert.h and
// attention.h, so that tests can hold each of them to the scalar one. Not for
// use outside kernels/ and its tests. As for what may be included, see
// kernels/kvc1_types.h.

#include "kernels/attention.h"
#include "kernels/convert.h"
#include "kernels/kvc1_internal.h"
#include "kernels/paged_copy.h"

namespace larder::kernels::internal {

struct PagedKernel {
  void (*gather)(const PagedCopy& copy);
  void (*scatter)(const PagedCopy& copy);
  void (*convert)(const RowsConversion& conversion);
  void (*decode_grouped)(const GroupedRows& rows);
  void (*attend)(const DecodeAttention& attention);
};

extern const PagedKernel kPagedScalar;
// Tables of nulls where the compiler does not have the level.
extern const PagedKernel kPagedAvx2;
extern const PagedKernel kPagedAvx512;

// Null if this CPU (or this build) does not have the level.
const PagedKernel* PagedKernelAt(Level level);
const PagedKernel& BestPagedKernel();
// For benchmarks, as UseKvc1Kernel.
bool UsePagedKernel(Level level);
void UseBestPagedKernel();

// Where a token is, from its plane's base; false: skip.
struct TokenSpot {
  int64_t block;
  int64_t within;
};
[[gnu::always_inline]] inline bool Locate(const TokenPlaces& places,
                                          uint64_t token, TokenSpot* spot) {
  const int64_t size = places.block_tokens;
  if (places.tokens_per_place == 1) {
    const int64_t place = places.places[token];
    if (place < 0) return false;
    spot->block = place / size;
    spot->within = place % size;
    return true;
  }
  const int64_t place = places.places[token / places.block_tokens];
  if (place < 0) return false;
  spot->block = place;
  spot->within = static_cast<int64_t>(token % places.block_tokens);
  return true;
}

[[gnu::always_inline]] inline int64_t OffsetOf(const PagedPlane& plane,
                                               const TokenSpot& spot,
                                               uint32_t head) {
  return spot.block * plane.block_stride + spot.within * plane.token_stride +
         int64_t{head} * plane.head_stride;
}

// One element by itself.
float F32FromE4m3(uint8_t bits);
uint8_t E4m3FromF32(float value);
float LoadAs(Element element, const void* row, uint32_t index);

}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_PAGED_INTERNAL_H_
