#include "tools/reference_engine/attention.h"

#include <cmath>
#include <vector>

#include "kernels/attention.h"
#include "tools/reference_engine/paged_cache.h"

namespace larder::reference {

void AttendPaged(const AttentionShape& shape, const float* queries,
                 const kernels::PagedPlane& keys,
                 const kernels::PagedPlane& values,
                 std::span<const int64_t> table,
                 std::span<const uint32_t> lengths, float* out) {
  const auto rows_of = [&shape](const kernels::PagedPlane& rows) {
    kernels::AttentionPlane plane{};
    plane.rows = rows;
    plane.element = kernels::Element::kF16;
    plane.dim = shape.head_size;
    return plane;
  };
  std::vector<float> maxima(lengths.size() * shape.heads);
  std::vector<float> sums(maxima.size());
  kernels::DecodeAttention attention{};
  attention.queries = queries;
  attention.query_head_stride =
      static_cast<int64_t>(shape.head_size * sizeof(float));
  attention.query_sequence_stride = attention.query_head_stride * shape.heads;
  attention.query_element = kernels::Element::kF32;
  attention.sequences = static_cast<uint32_t>(lengths.size());
  attention.query_heads = shape.heads;
  attention.kv_heads = shape.kv_heads;
  attention.softmax_scale = 1 / std::sqrt(static_cast<float>(shape.head_size));
  attention.keys = rows_of(keys);
  attention.values = rows_of(values);
  // Every query reads the same blocks.
  attention.places = {table.data(), kBlockTokens, kBlockTokens};
  attention.lengths = lengths.data();
  attention.parts = 1;
  attention.outputs = out;
  attention.maxima = maxima.data();
  attention.sums = sums.data();
  kernels::Attend(attention);
}

}  // namespace larder::reference
