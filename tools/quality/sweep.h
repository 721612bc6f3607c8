#ifndef LARDER_TOOLS_QUALITY_SWEEP_H_
#define LARDER_TOOLS_QUALITY_SWEEP_H_

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/quality/engine.h"
#include "tools/quality/metrics.h"
#include "tools/quality/subject.h"
#include "tools/quality/texts.h"

namespace larder::quality {

// What one text says about one subject.
struct TextFigures {
  Rate rate;
  std::vector<double> kl;         // of every position of the suffix
  uint32_t same_top = 0;          // positions
  double delta_nll = 0;           // summed over positions with a next token
  std::vector<double> attention;  // relative squared error of each layer
  bool retrieved = false;         // the answer, if there is one
};

struct PointFigures {
  std::string name;
  std::string parameters;
  uint64_t profile_bytes = 0;
  std::vector<TextFigures> texts;
};

struct SweepFigures {
  std::vector<PointFigures> points;   // one per subject, in their order
  std::vector<char> reference_found;  // per text: without any codec
};

struct SweepOptions {
  // Of the suffix's queries, how many there are to one that is looked at for
  // the error of attention; 0: that error is not measured.
  uint32_t query_stride = 4;
  // Told after every subject of every text what share is done, by one thread at
  // a time.
  std::function<void(double share)> progress;
};

// Each engine works on a text of its own, on a thread of its own. The figures
// do not depend on how many there are.
using Engines = std::span<const std::unique_ptr<QualityEngine>>;

// K and V of texts, for Calibrate; queries too if a subject wants them.
StatusOr<std::vector<Capture>> CaptureTexts(Engines engines,
                                            std::span<const SplitText> texts,
                                            bool with_queries);

StatusOr<SweepFigures> RunSweep(Engines engines,
                                std::span<const SplitText> texts,
                                const Subjects& subjects,
                                const SweepOptions& options);

// A profile is spread over so many tokens.
inline constexpr double kProfileTokens = 100000;

// Figures of one point over all texts or over those drawn.
double BitsPerElement(const PointFigures& point, const ModelShape& shape,
                      std::span<const uint32_t> texts);
double MeanKl(const PointFigures& point, std::span<const uint32_t> texts);
std::vector<uint32_t> AllTexts(const PointFigures& point);

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

#endif  // LARDER_TOOLS_QUALITY_SWEEP_H_
