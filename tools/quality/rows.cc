#include "tools/quality/rows.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

#include "codec/baselines/baseline.h"
#include "tools/quality/profile_subject.h"

namespace larder::quality {
namespace {

constexpr double kMarks[] = {0.03, 0.01, 0.003};
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr char kBits[] = "bits/el";

using Drawn = std::span<const uint32_t>;
using Figure = std::function<double(Drawn)>;

Row MakeRow(std::string name, std::string unit, uint32_t texts,
            const Figure& value, const Figure& limit, std::string note) {
  std::vector<uint32_t> all(texts);
  std::iota(all.begin(), all.end(), 0u);
  Row row{.name = std::move(name),
          .unit = std::move(unit),
          .limit = limit(all),
          .value = value(all),
          .note = std::move(note)};
  row.ratio = Bootstrap(
      texts, [&](Drawn drawn) { return value(drawn) / limit(drawn); });
  return row;
}

class Maker {
 public:
  Maker(std::span<const PointFigures> points, const ModelShape& shape)
      : points_(points), shape_(shape), curves_(CurvesOf(points)) {}

  const PointCurve* Find(std::string_view name) const {
    for (const PointCurve& curve : curves_) {
      if (curve.name == name) return &curve;
    }
    return nullptr;
  }

  void Add(std::string name, std::string unit, uint32_t texts,
           const Figure& value, const Figure& limit, std::string note) {
    rows.push_back(MakeRow(std::move(name), std::move(unit), texts, value,
                           limit, std::move(note)));
  }

  // Bits at equal divergence, of one curve and another.
  void AddAgainst(const std::string& name, const std::string& ours,
                  const std::string& theirs) {
    const PointCurve *value = Find(ours), *limit = Find(theirs);
    if (value == nullptr || limit == nullptr) return;
    Add(name, kBits, TextsOf(*value), At(*value, kRowMark),
        At(*limit, kRowMark),
        absl::StrCat(ours, " and ", theirs, " at mean KL ", kRowMark));
  }

  // Bits at equal divergence, of one curve and the lowest of all baselines.
  void AddAgainstAll(const std::string& prefix, const std::string& ours) {
    const PointCurve* const value = Find(ours);
    std::vector<const PointCurve*> baselines;
    for (const std::string_view name : baselines::CurveNames()) {
      if (const PointCurve* curve = Find(name)) baselines.push_back(curve);
    }
    if (value == nullptr || baselines.empty()) return;
    for (const double mark : kMarks) {
      const auto lowest = [&](Drawn texts, const PointCurve*& which) {
        double bits = kNan;
        for (const PointCurve* curve : baselines) {
          const double at = BitsAtOrNan(*curve, shape_, mark, texts);
          if (std::isnan(at) || at >= bits) continue;
          bits = at;
          which = curve;
        }
        return bits;
      };
      const PointCurve* best = nullptr;
      lowest(AllTexts(*value->points[0]), best);
      Add(
          absl::StrCat(prefix, ".kl", mark), kBits, TextsOf(*value),
          At(*value, mark),
          [&](Drawn texts) {
            const PointCurve* which = nullptr;
            return lowest(texts, which);
          },
          absl::StrCat(ours, " and the lowest of ", baselines.size(),
                       " baselines, ", best ? best->name : "none of them",
                       ", at mean KL ", mark));
    }
  }

  // How many times smaller than 16 bits.
  void AddLossless(const std::string& name, const std::string& curve) {
    const PointCurve* const found = Find(curve);
    if (found == nullptr) return;
    const PointFigures& point = *found->points[0];
    const Figure times = [&](Drawn texts) {
      return 16 / BitsPerElement(point, shape_, texts);
    };
    Add(
        name, "x", TextsOf(*found), times, [](Drawn) { return 1.0; },
        absl::StrFormat("%.3f of 16 bits",
                        BitsPerElement(point, shape_, AllTexts(point))));
  }

  // What the same level costs in planes, at the level nearest to the mark: a
  // row for each number of planes.
  void AddPlanes(const std::string& name, const std::string& curve) {
    const PointCurve* const one = Find(curve);
    if (one == nullptr) return;
    const PointFigures* const limit = NearestTo(kRowMark, points_, curve);
    for (const int planes : {2, 3}) {
      for (const PointFigures& value : points_) {
        if (value.name != PlanesName(curve, planes) ||
            value.parameters != limit->parameters) {
          continue;
        }
        Add(absl::StrCat(name, ".", planes), kBits, TextsOf(*one), Of(value),
            Of(*limit),
            absl::StrCat(curve, ", ", value.parameters, ": ", planes,
                         " planes and one"));
      }
    }
  }

  std::vector<Row> rows;

 private:
  static uint32_t TextsOf(const PointCurve& curve) {
    return static_cast<uint32_t>(curve.points[0]->texts.size());
  }
  Figure At(const PointCurve& curve, double kl) const {
    return [this, &curve, kl](Drawn texts) {
      return BitsAtOrNan(curve, shape_, kl, texts);
    };
  }
  Figure Of(const PointFigures& point) const {
    return [this, &point](Drawn texts) {
      return BitsPerElement(point, shape_, texts);
    };
  }

  const std::span<const PointFigures> points_;
  const ModelShape& shape_;
  const std::vector<PointCurve> curves_;
};

}  // namespace

RowCurves DefaultCurves(std::span<const PointFigures> points) {
  const auto first = [&](std::initializer_list<std::string_view> names) {
    for (const std::string_view name : names) {
      for (const PointFigures& point : points) {
        if (point.name == name) return point.name;
      }
    }
    return std::string();
  };
  return {
      .ecsq = first({"ecsq", "kvc1-trellis", "kvc1-predicted", "kvc1-scalar"}),
      .klt = first({"klt", "kvc1-klt"})};
}

const PointFigures* NearestTo(double kl, std::span<const PointFigures> points,
                              const std::string& name) {
  const PointFigures* nearest = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const PointFigures& point : points) {
    const double distance =
        std::abs(std::log(MeanKl(point, AllTexts(point)) / kl));
    if (point.name != name || !(distance < least)) continue;
    least = distance;
    nearest = &point;
  }
  return nearest;
}

Row BankRow(std::span<const BankCost::Bits> texts, const std::string& of) {
  const auto mean = [texts](double BankCost::Bits::*bits) {
    return [texts, bits](Drawn drawn) {
      double sum = 0, elements = 0;
      for (const uint32_t text : drawn) {
        sum += texts[text].*bits;
        elements += texts[text].elements;
      }
      return sum / elements;
    };
  };
  return MakeRow("quality.bank", kBits, static_cast<uint32_t>(texts.size()),
                 mean(&BankCost::Bits::bank), mean(&BankCost::Bits::trained),
                 absl::StrCat(of,
                              ": cross-entropy in the bank's tables and in "
                              "trained ones"));
}

std::vector<Row> MakeRows(std::span<const PointFigures> points,
                          const ModelShape& shape, const RowCurves& curves) {
  Maker maker(points, shape);
  maker.AddAgainst("quality.ecsq_vs_cachegen_ideal", curves.ecsq,
                   "cachegen-static");
  maker.AddAgainst("quality.ecsq_vs_cachegen_released", curves.ecsq,
                   "cachegen-released");
  maker.AddAgainst("quality.klt_vs_cachegen_ideal", curves.klt,
                   "cachegen-static");
  maker.AddAgainstAll("quality.ecsq_vs_best", curves.ecsq);
  maker.AddAgainstAll("quality.klt_vs_best", curves.klt);
  maker.AddLossless("quality.lossless.bf16", kLosslessBf16);
  maker.AddLossless("quality.lossless.fp16", "lossless");
  maker.AddPlanes("quality.planes", curves.ecsq);
  maker.AddPlanes("quality.planes.klt", curves.klt);
  return std::move(maker.rows);
}

}  // namespace larder::quality
