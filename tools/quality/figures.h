#ifndef LARDER_TOOLS_QUALITY_FIGURES_H_
#define LARDER_TOOLS_QUALITY_FIGURES_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "store/types.h"
#include "tools/quality/metrics.h"
#include "tools/quality/subject.h"

namespace larder::quality {

// What one text says about one subject.
struct TextFigures {
  Rate rate;
  std::vector<double> kl;         // of every position of the suffix
  uint32_t same_top = 0;          // positions
  double delta_nll = 0;           // summed over positions with a next token
  std::vector<double> attention;  // relative squared error of each layer
  // The answer, if there is one: found; found by the unmodified model.
  bool retrieved = false;
  bool retrievable = false;
  // Of all keys and values that were judged: equal ones give equal figures.
  Checksum values;
};

struct PointFigures {
  std::string name;
  std::string parameters;
  std::string profile;  // ProfileIdOf
  uint64_t profile_bytes = 0;
  std::vector<TextFigures> texts;
};

// A profile is spread over so many tokens.
inline constexpr double kProfileTokens = 100000;

// Figures of one point over all texts or over those drawn.
double BitsPerElement(const PointFigures& point, const ModelShape& shape,
                      std::span<const uint32_t> texts);
double MeanKl(const PointFigures& point, std::span<const uint32_t> texts);
std::vector<uint32_t> AllTexts(const PointFigures& point);

// Points of one name, in their order.
struct PointCurve {
  std::string name;
  std::vector<const PointFigures*> points;
};
std::vector<PointCurve> CurvesOf(std::span<const PointFigures> points);
// BitsAt (curve.h) of all texts or of those drawn; NaN if it is not reached.
double BitsAtOrNan(const PointCurve& curve, const ModelShape& shape, double kl,
                   std::span<const uint32_t> texts);

// One point, over all its texts.
struct Summary {
  Interval bits;
  Interval kl;
  double p99_kl = 0;
  double max_kl = 0;
  Interval top1;
  Interval delta_nll;
  double attention = 0;        // mean over layers and texts
  double worst_attention = 0;  // of the worst layer, over texts
  std::vector<double> attention_of_layers;
  double retrieved = 0;  // share of texts whose answer was found
};
Summary Summarize(const PointFigures& point, const ModelShape& shape);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_FIGURES_H_
