#include "tools/quality/rows.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

#include "codec/baselines/baseline.h"
#include "tools/quality/profile_subject.h"

namespace larder::quality {
namespace {

constexpr double kMarks[] = {0.03, 0.01, 0.003};
constexpr double kMark = 0.01;  // at which ratios are promised
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr char kBits[] = "bits/el";

using Drawn = std::span<const uint32_t>;
using Figure = std::function<double(Drawn)>;

class Maker {
 public:
  Maker(std::span<const PointFigures> points, const ModelShape& shape)
      : shape_(shape), curves_(CurvesOf(points)) {}

  const PointCurve* Find(std::string_view name) const {
    for (const PointCurve& curve : curves_) {
      if (curve.name == name) return &curve;
    }
    return nullptr;
  }

  void Add(std::string name, std::string unit, uint32_t texts,
           const Figure& value, const Figure& limit, std::string note) {
    std::vector<uint32_t> all(texts);
    for (uint32_t i = 0; i < texts; ++i) all[i] = i;
    Row row{.name = std::move(name),
            .unit = std::move(unit),
            .limit = limit(all),
            .value = value(all),
            .note = std::move(note)};
    row.ratio = Bootstrap(
        texts, [&](Drawn drawn) { return value(drawn) / limit(drawn); });
    rows.push_back(std::move(row));
  }

  // Bits at equal divergence, of one curve and another.
  void AddAgainst(const std::string& name, const std::string& ours,
                  const std::string& theirs) {
    const PointCurve *value = Find(ours), *limit = Find(theirs);
    if (value == nullptr || limit == nullptr) return;
    Add(name, kBits, TextsOf(*value), At(*value, kMark), At(*limit, kMark),
        absl::StrCat(ours, " and ", theirs, " at mean KL ", kMark));
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

  // What the same level costs in planes, at the level nearest to the mark.
  void AddPlanes(const std::string& name, const std::string& curve) {
    const PointCurve* const one = Find(curve);
    if (one == nullptr) return;
    for (const int planes : {3, 2}) {
      const PointCurve* const several = Find(PlanesName(curve, planes));
      if (several == nullptr) continue;
      const PointFigures *value = nullptr, *limit = nullptr;
      double nearest = std::numeric_limits<double>::infinity();
      for (const PointFigures* a : one->points) {
        for (const PointFigures* b : several->points) {
          const double distance =
              std::abs(std::log(MeanKl(*a, AllTexts(*a)) / kMark));
          if (a->parameters != b->parameters || !(distance < nearest)) continue;
          nearest = distance;
          limit = a;
          value = b;
        }
      }
      if (value == nullptr) continue;
      Add(name, kBits, TextsOf(*one), Of(*value), Of(*limit),
          absl::StrCat(curve, ", ", value->parameters, ": ", planes,
                       " planes and one"));
      return;
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
  return {.ecsq = first({"ecsq", "kvc1-predicted", "kvc1-scalar"}),
          .klt = first({"klt", "kvc1-klt"})};
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
