#include "tools/quality/figures.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "tools/quality/curve.h"

namespace larder::quality {
namespace {

template <typename Figure>
double Sum(const PointFigures& point, std::span<const uint32_t> texts,
           Figure figure) {
  double sum = 0;
  for (const uint32_t text : texts) sum += figure(point.texts[text]);
  return sum;
}

double Positions(const TextFigures& text) {
  return static_cast<double>(text.kl.size());
}

}  // namespace

std::vector<uint32_t> AllTexts(const PointFigures& point) {
  std::vector<uint32_t> texts(point.texts.size());
  std::iota(texts.begin(), texts.end(), 0u);
  return texts;
}

double BitsPerElement(const PointFigures& point, const ModelShape& shape,
                      std::span<const uint32_t> texts) {
  const double bits = Sum(point, texts, [](const TextFigures& text) {
    return static_cast<double>(text.rate.bits);
  });
  const double elements = Sum(point, texts, [](const TextFigures& text) {
    return static_cast<double>(text.rate.elements);
  });
  const double per_token = 2.0 * shape.row() * shape.layers;
  return bits / elements + static_cast<double>(point.profile_bytes) * 8 /
                               (kProfileTokens * per_token);
}

double MeanKl(const PointFigures& point, std::span<const uint32_t> texts) {
  return Sum(point, texts,
             [](const TextFigures& text) {
               return std::accumulate(text.kl.begin(), text.kl.end(), 0.0);
             }) /
         Sum(point, texts, Positions);
}

std::vector<PointCurve> CurvesOf(std::span<const PointFigures> points) {
  std::vector<PointCurve> curves;
  for (const PointFigures& point : points) {
    if (curves.empty() || curves.back().name != point.name) {
      curves.push_back({point.name, {}});
    }
    curves.back().points.push_back(&point);
  }
  return curves;
}

double BitsAtOrNan(const PointCurve& curve, const ModelShape& shape, double kl,
                   std::span<const uint32_t> texts) {
  std::vector<CurvePoint> points;
  for (const PointFigures* point : curve.points) {
    points.push_back(
        {BitsPerElement(*point, shape, texts), MeanKl(*point, texts)});
  }
  return BitsAt(points, kl).value_or(std::numeric_limits<double>::quiet_NaN());
}

Summary Summarize(const PointFigures& point, const ModelShape& shape) {
  const auto count = static_cast<uint32_t>(point.texts.size());
  const std::vector<uint32_t> all = AllTexts(point);
  Summary summary;
  using Drawn = std::span<const uint32_t>;
  summary.bits = Bootstrap(
      count, [&](Drawn texts) { return BitsPerElement(point, shape, texts); });
  summary.kl =
      Bootstrap(count, [&](Drawn texts) { return MeanKl(point, texts); });
  summary.top1 = Bootstrap(count, [&](Drawn texts) {
    return Sum(point, texts,
               [](const TextFigures& text) { return double(text.same_top); }) /
           Sum(point, texts, Positions);
  });
  summary.delta_nll = Bootstrap(count, [&](Drawn texts) {
    // The last position of a text has no next token.
    return Sum(point, texts,
               [](const TextFigures& text) { return text.delta_nll; }) /
           Sum(point, texts,
               [](const TextFigures& text) { return Positions(text) - 1; });
  });
  std::vector<double> kl;
  for (const TextFigures& text : point.texts) {
    kl.insert(kl.end(), text.kl.begin(), text.kl.end());
  }
  std::sort(kl.begin(), kl.end());
  summary.max_kl = kl.back();
  summary.p99_kl =
      kl[static_cast<size_t>(0.99 * static_cast<double>(kl.size() - 1) + 0.5)];
  for (const TextFigures& text : point.texts) {
    summary.attention_of_layers.resize(text.attention.size());
    for (size_t layer = 0; layer < text.attention.size(); ++layer) {
      summary.attention_of_layers[layer] += text.attention[layer] / count;
    }
  }
  if (!summary.attention_of_layers.empty()) {
    const std::vector<double>& layers = summary.attention_of_layers;
    summary.attention = std::accumulate(layers.begin(), layers.end(), 0.0) /
                        static_cast<double>(layers.size());
    summary.worst_attention = *std::max_element(layers.begin(), layers.end());
  }
  summary.retrieved =
      Sum(point, all,
          [](const TextFigures& text) { return text.retrieved ? 1.0 : 0.0; }) /
      count;
  return summary;
}

}  // namespace larder::quality
