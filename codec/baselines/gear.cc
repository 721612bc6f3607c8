// GEAR (arXiv 2403.05527): values that stand out are kept as they are (half of
// the share at either end, for each channel of K and each token of V), the rest
// is quantized asymmetrically over the same groups, and the remaining error of
// each head is approximated by a matrix of low rank, found by power iteration.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "codec/baselines/affine.h"
#include "codec/baselines/baseline.h"

namespace larder::baselines {
namespace {

constexpr int kIterations = 3;

// tokens x dim, times a factor of `rank` columns, and so on: small matrices,
// row-major.
struct LowRank {
  std::vector<float> left;   // [token][rank]
  std::vector<float> right;  // [dim][rank]
};

// Makes the columns of [n][rank] orthonormal, in order.
void Orthonormalize(std::vector<float>& columns, size_t rank) {
  const size_t n = columns.size() / rank;
  for (size_t k = 0; k < rank; ++k) {
    for (size_t j = 0; j < k; ++j) {
      float dot = 0;
      for (size_t i = 0; i < n; ++i) {
        dot += columns[i * rank + k] * columns[i * rank + j];
      }
      for (size_t i = 0; i < n; ++i) {
        columns[i * rank + k] -= dot * columns[i * rank + j];
      }
    }
    float norm = 0;
    for (size_t i = 0; i < n; ++i) {
      norm += columns[i * rank + k] * columns[i * rank + k];
    }
    norm = std::sqrt(norm);
    for (size_t i = 0; i < n; ++i) {
      columns[i * rank + k] = norm > 1e-12f ? columns[i * rank + k] / norm : 0;
    }
  }
}

// matrix [tokens][dim] ~ left * right^T.
LowRank Approximate(const std::vector<float>& matrix, size_t dim, size_t rank) {
  const size_t tokens = matrix.size() / dim;
  LowRank low;
  low.right.resize(dim * rank);
  uint32_t random = 1;  // any start that is not orthogonal to the answer
  for (float& value : low.right) {
    random = random * 1664525u + 1013904223u;
    value = static_cast<float>(random >> 8) / 16777216.0f - 0.5f;
  }
  for (int i = 0; i < kIterations; ++i) {
    Orthonormalize(low.right, rank);
    low.left.assign(tokens * rank, 0);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t d = 0; d < dim; ++d) {
        for (size_t k = 0; k < rank; ++k) {
          low.left[t * rank + k] +=
              matrix[t * dim + d] * low.right[d * rank + k];
        }
      }
    }
    if (i + 1 == kIterations) break;
    low.right.assign(dim * rank, 0);
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t d = 0; d < dim; ++d) {
        for (size_t k = 0; k < rank; ++k) {
          low.right[d * rank + k] +=
              matrix[t * dim + d] * low.left[t * rank + k];
        }
      }
    }
  }
  return low;
}

class Gear final : public Baseline {
 public:
  explicit Gear(const GearOptions& options) : options_(options) {}

  std::string_view name() const override { return "gear"; }
  std::string parameters() const override {
    return absl::StrCat(options_.bits, " bit, rank ", options_.rank, ", ",
                        std::lround(options_.outliers * 100), " % outliers");
  }
  // The low rank is of a prefix: for each chunk it would cost twice as much.
  Unit unit() const override { return Unit::kPrefix; }

 protected:
  StatusOr<std::vector<std::byte>> DoEncode(const Block& block) const override {
    LARDER_RETURN_IF_ERROR(Check(block.shape));
    Writer out;
    for (const bool is_values : {false, true}) {
      EncodeHalf(block.shape, AsFloats(is_values ? block.values : block.keys),
                 is_values, out);
    }
    return std::move(out).Take();
  }

  Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                  std::span<uint16_t> keys,
                  std::span<uint16_t> values) const override {
    LARDER_RETURN_IF_ERROR(Check(shape));
    Reader in(encoded);
    LARDER_RETURN_IF_ERROR(DecodeHalf(shape, false, in, keys));
    LARDER_RETURN_IF_ERROR(DecodeHalf(shape, true, in, values));
    return in.Finish();
  }

 private:
  static Status Check(const BlockShape& shape) {
    if (shape.tokens > 65536 || shape.row() > 65536) {
      return absl::InvalidArgumentError("more than 16 bits can count");
    }
    return absl::OkStatus();
  }

  // A group is a channel of K or a token of V: where its i-th value lies.
  struct Groups {
    size_t count, size, group_step, value_step;
    size_t At(size_t group, size_t i) const {
      return group * group_step + i * value_step;
    }
  };
  static Groups GroupsOf(const BlockShape& shape, bool is_values) {
    return is_values ? Groups{shape.tokens, shape.row(), shape.row(), 1}
                     : Groups{shape.row(), shape.tokens, 1, shape.row()};
  }
  // Of a group, at each end.
  size_t Outliers(const Groups& groups) const {
    return static_cast<size_t>(options_.outliers *
                               static_cast<float>(groups.size) / 2);
  }

  void EncodeHalf(const BlockShape& shape, const std::vector<float>& values,
                  bool is_values, Writer& out) const {
    const Groups groups = GroupsOf(shape, is_values);
    const size_t ends = Outliers(groups);
    std::vector<float> error(values.size());
    std::vector<size_t> order(groups.size);
    std::vector<float> rest(groups.size - 2 * ends);
    for (size_t g = 0; g < groups.count; ++g) {
      std::iota(order.begin(), order.end(), size_t{0});
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        return values[groups.At(g, a)] < values[groups.At(g, b)];
      });
      std::vector<size_t> kept(order.begin(),
                               order.begin() + static_cast<ptrdiff_t>(ends));
      kept.insert(kept.end(), order.end() - static_cast<ptrdiff_t>(ends),
                  order.end());
      std::sort(kept.begin(), kept.end());
      for (const size_t i : kept) {
        out.U16(static_cast<uint32_t>(i));
        out.U16(FloatToHalf(values[groups.At(g, i)]));
      }
      for (size_t i = ends; i + ends < groups.size; ++i) {
        rest[i - ends] = values[groups.At(g, order[i])];
      }
      const Affine affine = Affine::Of(rest, options_.bits, out);
      size_t next = 0;
      for (size_t i = 0; i < groups.size; ++i) {
        if (next < kept.size() && kept[next] == i) {
          ++next;
          continue;
        }
        const float value = values[groups.At(g, i)];
        const uint32_t level = affine.Level(value, options_.bits);
        out.Bits(level, options_.bits);
        error[groups.At(g, i)] = value - affine.Value(level);
      }
      out.Align();
    }
    const size_t dim = shape.dim;
    for (size_t head = 0; head < shape.heads && options_.rank > 0; ++head) {
      std::vector<float> matrix(shape.tokens * dim);
      for (size_t t = 0; t < shape.tokens; ++t) {
        for (size_t d = 0; d < dim; ++d) {
          matrix[t * dim + d] = error[t * shape.row() + head * dim + d];
        }
      }
      const LowRank low = Approximate(matrix, dim, options_.rank);
      for (const float value : low.left) out.Half(value);
      for (const float value : low.right) out.Half(value);
    }
  }

  Status DecodeHalf(const BlockShape& shape, bool is_values, Reader& in,
                    std::span<uint16_t> rows) const {
    const Groups groups = GroupsOf(shape, is_values);
    const size_t kept = 2 * Outliers(groups);
    std::vector<float> values(rows.size());
    std::vector<bool> exact(rows.size());
    for (size_t g = 0; g < groups.count; ++g) {
      size_t previous = groups.size;
      for (size_t k = 0; k < kept; ++k) {
        const uint32_t i = in.U16();
        const float value = in.Half();
        if (i >= groups.size || (k > 0 && i <= previous)) {
          return absl::DataLossError("outliers that are out of order");
        }
        previous = i;
        values[groups.At(g, i)] = value;
        exact[groups.At(g, i)] = true;
      }
      const Affine affine = Affine::Read(in);
      for (size_t i = 0; i < groups.size; ++i) {
        const size_t at = groups.At(g, i);
        if (!exact[at]) values[at] = affine.Value(in.Bits(options_.bits));
      }
      in.Align();
    }
    const size_t dim = shape.dim, rank = options_.rank;
    std::vector<float> left(shape.tokens * rank), right(dim * rank);
    for (size_t head = 0; head < shape.heads && rank > 0; ++head) {
      for (float& value : left) value = in.Half();
      for (float& value : right) value = in.Half();
      for (size_t t = 0; t < shape.tokens; ++t) {
        for (size_t d = 0; d < dim; ++d) {
          const size_t at = t * shape.row() + head * dim + d;
          if (exact[at]) continue;
          for (size_t k = 0; k < rank; ++k) {
            values[at] += left[t * rank + k] * right[d * rank + k];
          }
        }
      }
    }
    std::transform(values.begin(), values.end(), rows.begin(), FloatToHalf);
    return absl::OkStatus();
  }

  const GearOptions options_;
};

}  // namespace

std::unique_ptr<Baseline> MakeGear(const GearOptions& options) {
  return std::make_unique<Gear>(options);
}

}  // namespace larder::baselines
