#ifndef LARDER_TOOLS_QUALITY_SWEEP_H_
#define LARDER_TOOLS_QUALITY_SWEEP_H_

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/quality/engine.h"
#include "tools/quality/figures.h"
#include "tools/quality/subject.h"
#include "tools/quality/texts.h"

namespace larder::quality {

struct SweepFigures {
  std::vector<PointFigures> points;  // one per subject, in their order
};

struct SweepOptions {
  // Of the suffix's queries, how many there are to one that is looked at for
  // the error of attention; 0: that error is not measured.
  uint32_t query_stride = 4;
  // Told after every subject of every text what share is done, by one thread at
  // a time.
  std::function<void(double share)> progress;
  // Figures that an earlier run found, by the indexes of a subject and a text;
  // null if there are none. Those of a subject are taken only if it still makes
  // the very same of the first text: as many bits, decoded to the same values.
  // All is asked for before anything is measured, and must live until RunSweep
  // returns.
  std::function<const TextFigures*(size_t subject, size_t text)> known;
  // Told what was measured, by one thread at a time.
  std::function<void(size_t subject, size_t text, const TextFigures&)> measured;
  // Told whose known figures are not taken.
  std::function<void(size_t subject)> outdated;
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

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_SWEEP_H_
