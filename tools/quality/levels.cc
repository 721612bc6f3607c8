#include "tools/quality/levels.h"

#include <algorithm>
#include <cmath>

#include "tools/quality/profile_subject.h"
#include "tools/quality/subject.h"

namespace larder::quality {

std::vector<double> StepsFor(std::span<const double> steps,
                             std::span<const double> costs,
                             std::span<const double> wanted) {
  std::vector<double> out;
  for (const double target : wanted) {
    size_t at = 1;
    while (at + 1 < costs.size() && costs[at] < target) ++at;
    const double slope = std::log(steps[at] / steps[at - 1]) /
                         std::log(costs[at] / costs[at - 1]);
    // Steps that cost less than finer ones are noise.
    const double sane =
        std::isfinite(slope) && slope > 0.1 && slope < 2 ? slope : 0.5;
    out.push_back(steps[at - 1] *
                  std::exp(sane * std::log(target / costs[at - 1])));
  }
  return out;
}

StatusOr<std::shared_ptr<const Profile>> FitLevels(
    Engines engines, std::span<const SplitText> texts,
    std::shared_ptr<const Profile> profile, const calibrate::Samples& samples,
    std::span<const double> wanted, int rounds,
    const calibrate::Options& options, const SweepOptions& sweep,
    calibrate::Summary* summary) {
  const SpaceDescriptor space =
      MakeSpace(engines[0]->shape(), engines[0]->weights());
  for (int round = 0; round < rounds; ++round) {
    const Subjects subjects =
        MakeProfileSubjects("profile", profile, space, {});
    LARDER_ASSIGN_OR_RETURN(const SweepFigures figures,
                            RunSweep(engines, texts, subjects, sweep));
    const std::vector<float>& steps =
        profile->contents().groups[0].keys[0].step;
    std::vector<double> factors, costs;
    for (size_t level = 0; level < subjects.size(); ++level) {
      const PointFigures& point = figures.points[level];
      factors.push_back(double{steps[level]} / steps[0]);
      costs.push_back(std::max(MeanKl(point, AllTexts(point)), 1e-9));
    }
    if (factors.size() < 2) {
      return absl::InvalidArgumentError("a profile of one level");
    }
    LARDER_ASSIGN_OR_RETURN(
        profile,
        calibrate::Rescale(*profile, samples, StepsFor(factors, costs, wanted),
                           wanted, options, summary));
  }
  return profile;
}

}  // namespace larder::quality
