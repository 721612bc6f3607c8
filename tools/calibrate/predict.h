#ifndef LARDER_TOOLS_CALIBRATE_PREDICT_H_
#define LARDER_TOOLS_CALIBRATE_PREDICT_H_

#include <cstdint>
#include <span>
#include <vector>

#include "codec/profile.h"

namespace larder::calibrate {

// Integers of the channels of one block: [channel][row].
struct Integers {
  size_t channels = 0, rows = 0;
  std::vector<int16_t> values;

  const int16_t* column(size_t channel) const {
    return &values[channel * rows];
  }
  int16_t* column(size_t channel) { return &values[channel * rows]; }
};

// Which channels tell something of which, by least squares on `integers`, each
// parent the best beside those before it; parents that save less than
// `worthwhile` bits are left out. Without tables.
TensorProfile::Prediction ChoosePrediction(const Integers& integers,
                                           uint32_t channel_begin,
                                           int max_parents,
                                           double worthwhile = 0.002);

// What is coded instead of the integers; exactly as encoders do.
Integers Differences(const TensorProfile::Prediction& prediction,
                     const Integers& integers);

}  // namespace larder::calibrate

#endif  // LARDER_TOOLS_CALIBRATE_PREDICT_H_
