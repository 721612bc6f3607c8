#include <algorithm>
#include <cmath>

#include "kernels/attention.h"
#include "kernels/convert.h"
#include "kernels/level_choice_internal.h"
#include "kernels/paged_copy.h"
#include "kernels/paged_internal.h"

namespace larder::kernels {
namespace internal {

const PagedKernel* PagedKernelAt(Level level) {
  if (Kvc1KernelAt(level) == nullptr) return nullptr;
  switch (level) {
    case Level::kScalar:
      return &kPagedScalar;
#if defined(__x86_64__)
    // Every CPU with AVX-512 has FMA; of those with AVX2 nearly every one.
    case Level::kAvx2:
      return kPagedAvx2.gather != nullptr && __builtin_cpu_supports("fma")
                 ? &kPagedAvx2
                 : nullptr;
    case Level::kAvx512:
      return kPagedAvx512.gather != nullptr ? &kPagedAvx512 : nullptr;
#else
    default:
      return nullptr;
#endif
  }
  return nullptr;
}

using PagedChoice = LevelChoice<PagedKernel, PagedKernelAt>;

const PagedKernel& BestPagedKernel() {
  return PagedChoice::Get();
}

bool UsePagedKernel(Level level) {
  return PagedChoice::Use(level);
}

void UseBestPagedKernel() {
  PagedChoice::UseBest();
}

}  // namespace internal

using internal::BestPagedKernel;

namespace {

// Sums of a few products of 64-bit numbers stay far below 2^127.
using Wide = __int128;

// Where rows may begin, at the least and at the most, and end.
struct Extent {
  Wide least = 0, most = 0;
  void Step(int64_t stride, uint64_t count) {
    const Wide reach = Wide{stride} * static_cast<Wide>(count - 1);
    (reach < 0 ? least : most) += reach;
  }
};

bool IsInside(const Extent& extent, uint64_t row_bytes, const void* base,
              const void* memory, uint64_t memory_bytes) {
  const Wide at = static_cast<Wide>(reinterpret_cast<uintptr_t>(base)) -
                  static_cast<Wide>(reinterpret_cast<uintptr_t>(memory));
  return at + extent.least >= 0 &&
         at + extent.most + static_cast<Wide>(row_bytes) <=
             static_cast<Wide>(memory_bytes);
}

}  // namespace

bool Fits(const PagedCopy& copy, const PagedCopyBounds& bounds) {
  const TokenPlaces& places = copy.places;
  if (places.block_tokens == 0 ||
      (places.tokens_per_place != 1 &&
       places.tokens_per_place != places.block_tokens)) {
    return false;
  }
  if (copy.tokens == 0 || copy.heads == 0 || copy.row_bytes == 0) return true;
  Extent dense;
  dense.Step(copy.dense.head_stride, copy.heads);
  dense.Step(copy.dense.token_stride, copy.tokens);
  if (!IsInside(dense, copy.row_bytes, copy.dense.base, bounds.dense,
                bounds.dense_bytes)) {
    return false;
  }
  // From here on `tokens` is no more than the dense memory has, unless its
  // strides are 0, and so is what is read of places.
  const Wide end = static_cast<Wide>(bounds.blocks) *
                   (places.tokens_per_place == 1 ? places.block_tokens : 1);
  const uint64_t count = (copy.tokens - 1) / places.tokens_per_place + 1;
  bool any = false;
  for (uint64_t i = 0; i < count; ++i) {
    if (places.places[i] >= end) return false;
    any = any || places.places[i] >= 0;
  }
  if (!any) return true;
  Extent paged;
  paged.Step(copy.paged.block_stride, bounds.blocks);
  paged.Step(copy.paged.token_stride, places.block_tokens);
  paged.Step(copy.paged.head_stride, copy.heads);
  return IsInside(paged, copy.row_bytes, copy.paged.base, bounds.paged,
                  bounds.paged_bytes);
}

void Gather(const PagedCopy& copy) {
  BestPagedKernel().gather(copy);
}
void Scatter(const PagedCopy& copy) {
  BestPagedKernel().scatter(copy);
}

bool TryGather(const PagedCopy& copy, const PagedCopyBounds& bounds) {
  if (!Fits(copy, bounds)) return false;
  Gather(copy);
  return true;
}
bool TryScatter(const PagedCopy& copy, const PagedCopyBounds& bounds) {
  if (!Fits(copy, bounds)) return false;
  Scatter(copy);
  return true;
}

void Convert(const RowsConversion& conversion) {
  BestPagedKernel().convert(conversion);
}
void DecodeGrouped(const GroupedRows& rows) {
  BestPagedKernel().decode_grouped(rows);
}
void Attend(const DecodeAttention& attention) {
  BestPagedKernel().attend(attention);
}

void MergePartials(const PartialsMerge& merge) {
  for (uint64_t item = 0; item < merge.items; ++item) {
    float max = -INFINITY;
    for (uint64_t p = 0; p < merge.parts; ++p) {
      const uint64_t at = p * merge.items + item;
      if (merge.sums[at] != 0) max = std::fmax(max, merge.maxima[at]);
    }
    double sum = 0;
    const auto weight = [&](uint64_t p) {
      const uint64_t at = p * merge.items + item;
      return merge.sums[at] == 0
                 ? 0
                 : merge.sums[at] * std::exp(double{merge.maxima[at]} - max);
    };
    for (uint64_t p = 0; p < merge.parts; ++p) sum += weight(p);
    constexpr uint32_t kTile = 256;
    float tile[kTile];
    for (uint32_t c = 0; c < merge.dim; c += kTile) {
      const uint32_t width = std::min(kTile, merge.dim - c);
      std::fill_n(tile, width, 0.0f);
      for (uint64_t p = 0; p < merge.parts; ++p) {
        const double w = weight(p);
        if (w == 0) continue;
        const auto share = static_cast<float>(w / sum);
        const float* const part =
            merge.outputs + (p * merge.items + item) * merge.dim + c;
        for (uint32_t i = 0; i < width; ++i) tile[i] += share * part[i];
      }
      std::copy_n(tile, width, merge.output + item * merge.dim + c);
    }
    if (merge.max != nullptr) merge.max[item] = max;
    if (merge.sum != nullptr) merge.sum[item] = static_cast<float>(sum);
  }
}

}  // namespace larder::kernels
