#include "tools/calibrate/attention_metric.h"

#include <Eigen/Dense>

#include <algorithm>
#include <cmath>

#include "codec/baselines/half.h"

namespace larder::calibrate {
namespace {

using baselines::HalfToFloat;
using quality::Capture;
using quality::ModelShape;
using Matrix =
    Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Of the keys and queries of a text, one in so many is looked at: an average
// over thousands of pairs.
constexpr uint32_t kKeyStride = 4;
constexpr uint32_t kQueryStride = 1;

// Rows first, first + stride, ... of one head.
Matrix HeadRows(const quality::HalfRows& rows, uint32_t row_size, uint32_t head,
                uint32_t dim, uint32_t first, uint32_t end, uint32_t stride) {
  Matrix out((end - first + stride - 1) / stride, dim);
  for (Eigen::Index r = 0; r < out.rows(); ++r) {
    const uint16_t* from =
        rows.data() + (first + static_cast<size_t>(r) * stride) * row_size +
        size_t{head} * dim;
    for (uint32_t d = 0; d < dim; ++d) out(r, d) = HalfToFloat(from[d]);
  }
  return out;
}

}  // namespace

std::shared_ptr<const kvc1::Rotation> RotationOf(const ModelShape& shape,
                                                 uint32_t begin,
                                                 uint32_t rows) {
  kvc1::Rope rope;
  rope.pairs = shape.rope_adjacent ? kvc1::Rope::Pairs::kAdjacent
                                   : kvc1::Rope::Pairs::kHalves;
  rope.rotary_dim = shape.rope_dim;
  for (uint32_t pair = 0; pair < shape.rope_dim / 2; ++pair) {
    rope.frequencies.push_back(
        std::pow(double{shape.rope_base}, -2.0 * pair / shape.rope_dim));
  }
  return kvc1::RotationFor(rope, begin, 1, rows);
}

void Unrotate(const ModelShape& shape, const kvc1::Rotation& rotation,
              uint32_t row, float* head) {
  const uint32_t pairs = shape.rope_dim / 2;
  for (uint32_t pair = 0; pair < pairs; ++pair) {
    float& a = head[shape.rope_adjacent ? 2 * pair : pair];
    float& b = head[shape.rope_adjacent ? 2 * pair + 1 : pair + pairs];
    const float cos = rotation.cos[size_t{row} * pairs + pair];
    const float sin = rotation.sin[size_t{row} * pairs + pair];
    const float turned = a * cos + b * sin;
    b = b * cos - a * sin;
    a = turned;
  }
}

LayerMetrics AttentionMetrics(std::span<const Capture> captures, uint32_t layer,
                              const OutputProjection& projection,
                              uint32_t block_heads) {
  const ModelShape& shape = captures[0].shape;
  const uint32_t dim = shape.head_dim, heads = shape.query_heads;
  const uint32_t group = heads / shape.kv_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const Eigen::Map<const Matrix> weights(projection.weights.data(),
                                         projection.outputs, shape.query_row());
  const Matrix gram = weights.transpose() * weights;  // of all query heads
  const auto of_heads = [&](uint32_t a, uint32_t b) {
    return gram.block(a * dim, b * dim, dim, dim);
  };

  Eigen::MatrixXd keys = Eigen::MatrixXd::Zero(shape.row(), dim);
  Eigen::MatrixXd shared = Eigen::MatrixXd::Zero(heads, heads);
  double pairs = 0;
  for (const Capture& capture : captures) {
    const uint32_t tokens = capture.token_count();
    const uint32_t half = tokens / 2;
    const quality::CapturedLayer& from = capture.layers[layer];
    const auto rotation = RotationOf(shape, capture.position_begin, half);
    std::vector<Matrix> attention(heads);  // [query][key looked at]
    for (uint32_t h = 0; h < heads; ++h) {
      const uint32_t kv = h / group;
      const Matrix q = HeadRows(from.queries, shape.query_row(), h, dim, half,
                                tokens, kQueryStride);
      const Matrix k = HeadRows(from.keys, shape.row(), kv, dim, 0, tokens, 1);
      const Matrix v =
          HeadRows(from.values, shape.row(), kv, dim, 0, tokens, 1);
      Matrix p = q * k.transpose() * scale;
      for (Eigen::Index i = 0; i < p.rows(); ++i) {
        const Eigen::Index seen = half + i * kQueryStride + 1;
        const float most = p.row(i).head(seen).maxCoeff();
        p.row(i).head(seen) = (p.row(i).head(seen).array() - most).exp();
        p.row(i).tail(tokens - seen).setZero();
        p.row(i) /= p.row(i).sum();
      }
      const Matrix o = p * v;
      // |W (v - o)|^2 without forming W (v - o).
      const Matrix g = of_heads(h, h);
      const Matrix gv = v * g, go = o * g;
      const Eigen::VectorXf vv = (gv.array() * v.array()).rowwise().sum();
      const Eigen::VectorXf oo = (go.array() * o.array()).rowwise().sum();
      Matrix& kept = attention[h];
      kept.resize(p.rows(), (half - 1 + kKeyStride - 1) / kKeyStride);
      for (Eigen::Index n = 0; n < kept.cols(); ++n) {
        // The first token is kept as it is, and of no account.
        const auto j = static_cast<uint32_t>(1 + n * kKeyStride);
        kept.col(n) = p.col(j);
        const Eigen::VectorXf apart =
            (oo.array() + vv[j] - 2 * (go * v.row(j).transpose()).array())
                .max(0.0f);
        const Eigen::VectorXf weight =
            p.col(j).array().square() * apart.array() * (scale * scale);
        Matrix turned = q;
        for (Eigen::Index i = 0; i < turned.rows(); ++i) {
          Unrotate(shape, *rotation, j, turned.row(i).data());
        }
        const Matrix outer =
            (turned.array().colwise() * weight.array()).matrix().transpose() *
            turned;
        keys.middleRows(kv * dim, dim) += outer.cast<double>();
      }
    }
    for (uint32_t a = 0; a < heads; ++a) {
      for (uint32_t b = 0; b < heads; ++b) {
        shared(a, b) += (attention[a].array() * attention[b].array()).sum();
      }
    }
    pairs += static_cast<double>(attention[0].size());
  }

  LayerMetrics metrics;
  for (uint32_t begin = 0; begin < shape.kv_heads; begin += block_heads) {
    const uint32_t count = std::min(block_heads, shape.kv_heads - begin);
    const Eigen::Index n = count * dim;
    Eigen::MatrixXd k = Eigen::MatrixXd::Zero(n, n);
    Eigen::MatrixXd v = Eigen::MatrixXd::Zero(n, n);
    for (uint32_t head = 0; head < count; ++head) {
      k.block(head * dim, head * dim, dim, dim) =
          keys.middleRows((begin + head) * dim, dim);
    }
    for (uint32_t a = begin * group; a < (begin + count) * group; ++a) {
      for (uint32_t b = begin * group; b < (begin + count) * group; ++b) {
        v.block((a / group - begin) * dim, (b / group - begin) * dim, dim,
                dim) += shared(a, b) * of_heads(a, b).cast<double>();
      }
    }
    for (auto [from, to] :
         {std::pair(&k, &metrics.keys), std::pair(&v, &metrics.values)}) {
      const Eigen::MatrixXd symmetric =
          (*from + from->transpose()) / (2 * pairs);
      std::vector<float>& out = to->emplace_back();
      out.reserve(static_cast<size_t>(n * n));
      for (Eigen::Index r = 0; r < n; ++r) {
        for (Eigen::Index c = 0; c < n; ++c) {
          out.push_back(static_cast<float>(symmetric(r, c)));
        }
      }
    }
  }
  return metrics;
}

}  // namespace larder::calibrate
