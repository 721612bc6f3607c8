#ifndef LARDER_TOOLS_QUALITY_LEVELS_H_
#define LARDER_TOOLS_QUALITY_LEVELS_H_

#include <memory>
#include <span>
#include <vector>

#include "codec/profile.h"
#include "store/status.h"
#include "tools/calibrate/calibrate.h"
#include "tools/quality/sweep.h"
#include "tools/quality/texts.h"

namespace larder::quality {

// By what a step is to be multiplied for each divergence that is wanted, from
// steps (rising) and what they cost: on straight lines in logarithms of both,
// which go on beyond the outermost. REQUIRES: two points or more.
std::vector<double> StepsFor(std::span<const double> steps,
                             std::span<const double> costs,
                             std::span<const double> wanted);

// The profile with levels that cost what they are called: its levels are judged
// by the model, its steps scaled, its tables chosen anew; `rounds` times.
StatusOr<std::shared_ptr<const Profile>> FitLevels(
    Engines engines, std::span<const SplitText> texts,
    std::shared_ptr<const Profile> profile, const calibrate::Samples& samples,
    std::span<const double> wanted, int rounds,
    const calibrate::Options& options, const SweepOptions& sweep,
    calibrate::Summary* summary);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_LEVELS_H_
