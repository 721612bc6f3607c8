#ifndef LARDER_TOOLS_CALIBRATE_CALIBRATE_H_
#define LARDER_TOOLS_CALIBRATE_CALIBRATE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "codec/profile.h"
#include "store/status.h"
#include "tools/calibrate/samples.h"
#include "tools/quality/measurements.h"

namespace larder::calibrate {

// What a profile describes beside steps.
enum class Mode {
  kScalar,     // nothing
  kPredicted,  // integers from other channels'
  kTrellis,    // likewise, and those also along a trellis
  kKlt,        // a transform of each block of heads
};
// "scalar", "predicted", "trellis", "klt"; InvalidArgument names these.
StatusOr<Mode> ParseMode(const std::string& name);

struct Options {
  Mode mode = Mode::kTrellis;
  int parents = 32;  // of a channel at most, at most 32
  // How much of the metric's diagonal is added to it, so that no direction is
  // taken for worthless because few queries looked there.
  double ridge = 0.1;
  // The levels' mean KL divergence, finest first.
  std::vector<double> divergences = {0.001, 0.003, 0.01, 0.03, 0.1};
  // Rows that tables and transforms are fitted to at most; more are thinned.
  size_t most_rows = 16384;
  uint32_t threads = 1;
  std::string made_by;
  Sha256Digest weights{};
  std::function<void(const std::string& what, double share)> progress;
};

struct Summary {
  bool measured = false;  // by measurements; else by deviations alone
  // Of each level, by the samples: bits for each element of K and V in one
  // plane (without states and headers), and what the metrics expect it to cost.
  std::vector<double> key_bits, value_bits;
  std::vector<double> divergence;
  // Bits over the entropy of the very numbers, in the level in the middle.
  double table_overhead = 0;
  double parents = 0;  // of a channel, mean
};

// A profile from samples. Deterministic, whatever the number of threads.
// Without measurements every channel's errors are taken to cost in proportion
// to its head's variance, and `divergence` is a guess.
StatusOr<std::shared_ptr<const Profile>> Calibrate(
    const Samples& samples, const quality::Measurements* measurements,
    const Options& options, Summary* summary = nullptr);

// The same profile with levels whose steps are `factors` times those of its
// first level, and tables chosen anew from the samples.
StatusOr<std::shared_ptr<const Profile>> Rescale(
    const Profile& profile, const Samples& samples,
    std::span<const double> factors, std::span<const double> divergences,
    const Options& options, Summary* summary = nullptr);

}  // namespace larder::calibrate

#endif  // LARDER_TOOLS_CALIBRATE_CALIBRATE_H_
