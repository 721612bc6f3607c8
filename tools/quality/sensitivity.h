#ifndef LARDER_TOOLS_QUALITY_SENSITIVITY_H_
#define LARDER_TOOLS_QUALITY_SENSITIVITY_H_

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/calibrate/attention_metric.h"
#include "tools/quality/measurements.h"
#include "tools/quality/sweep.h"
#include "tools/quality/texts.h"

namespace larder::quality {

// The attention output projections of every layer of a GGUF file.
StatusOr<std::vector<calibrate::OutputProjection>> ReadOutputProjections(
    const std::string& model, const ModelShape& shape);

// The same model with weights of binary32. Products with weights of few bits
// round activations to 8 bits first, so that a change of any size flips some of
// them: a divergence of some 0.003 that no codec can be told from.
Status WriteUnquantized(const std::string& model, const std::string& out);

struct SensitivityOptions {
  // What noise everywhere at once should cost, to see whether it adds up.
  double divergence = 0.01;
  // Texts that metrics are made from; sensitivities are of all texts.
  uint32_t metric_texts = 8;
  std::function<void(const std::string& what, double share)> progress;
};

struct Sensitivity {
  Measurements measurements;
  // Whether it may be added up and scaled: what noise of a quarter of the
  // variance costs, over a quarter of what the whole does (median over some
  // components); what noise in all components at once costs, over the sum of
  // what each should (mean over texts).
  double linearity = 0;
  double additivity = 0;
};

// Puts noise into one head of the keys or of the values of one layer at a time
// and looks at what it does to the distributions of the suffix.
StatusOr<Sensitivity> MeasureSensitivity(Engines engines,
                                         const std::string& model,
                                         std::span<const SplitText> texts,
                                         const SensitivityOptions& options);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_SENSITIVITY_H_
