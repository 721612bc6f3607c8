#ifndef LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_

#include <cstdint>
#include <span>

#include "kernels/paged.h"

namespace larder::reference {

struct AttentionShape {
  uint32_t heads = 0;     // of the query
  uint32_t kv_heads = 0;  // of keys and values; divides heads
  uint32_t head_size = 0;
};

// Each of some query tokens over the tokens of a paged cache, fp16, up to its
// own: query i sees the first `lengths[i]` tokens of `table`. `queries` and
// `out` are [query][heads][head_size]. By kernels/attention.h; a query's result
// does not depend on the others.
void AttendPaged(const AttentionShape& shape, const float* queries,
                 const kernels::PagedPlane& keys,
                 const kernels::PagedPlane& values,
                 std::span<const int64_t> table,
                 std::span<const uint32_t> lengths, float* out);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_
