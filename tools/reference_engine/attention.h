#ifndef LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_

#include <cstdint>
#include <span>

#include "kernels/paged.h"

namespace larder::reference {

struct AttentionShape {
  uint32_t heads = 0;  // of the query; of KV: kv_heads, which divides it
  uint32_t kv_heads = 0;
  uint32_t head_size = 0;
};

// One query token over the first `tokens` tokens of a paged cache, fp16:
// softmax(query . keys / sqrt(head_size)) . values, per head. `query` and `out`
// are [heads][head_size].
void AttendPaged(const AttentionShape& shape, const float* query,
                 const kernels::PagedPlane& keys,
                 const kernels::PagedPlane& values,
                 std::span<const int64_t> table, uint32_t tokens, float* out);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_ATTENTION_H_
