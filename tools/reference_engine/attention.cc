#include "tools/reference_engine/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "tools/reference_engine/half.h"
#include "tools/reference_engine/paged_cache.h"

namespace larder::reference {

void AttendPaged(const AttentionShape& shape, const float* query,
                 const kernels::PagedPlane& keys,
                 const kernels::PagedPlane& values,
                 std::span<const int64_t> table, uint32_t tokens, float* out) {
  const uint32_t group = shape.heads / shape.kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(shape.head_size));
  std::vector<float> weights(tokens);
  for (uint32_t head = 0; head < shape.heads; ++head) {
    const float* const q = query + uint64_t{head} * shape.head_size;
    float* const o = out + uint64_t{head} * shape.head_size;
    float most = -std::numeric_limits<float>::infinity();
    for (uint32_t t = 0; t < tokens; ++t) {
      const uint16_t* const k = At(keys, table, t, head / group);
      float sum = 0;
      for (uint32_t d = 0; d < shape.head_size; ++d)
        sum += q[d] * FromF16(k[d]);
      weights[t] = sum * scale;
      most = std::max(most, weights[t]);
    }
    float total = 0;
    for (float& weight : weights) total += weight = std::exp(weight - most);
    std::fill_n(o, shape.head_size, 0.0f);
    for (uint32_t t = 0; t < tokens; ++t) {
      const uint16_t* const v = At(values, table, t, head / group);
      const float weight = weights[t] / total;
      for (uint32_t d = 0; d < shape.head_size; ++d) {
        o[d] += weight * FromF16(v[d]);
      }
    }
  }
}

}  // namespace larder::reference
