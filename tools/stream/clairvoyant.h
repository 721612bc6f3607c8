#ifndef LARDER_TOOLS_STREAM_CLAIRVOYANT_H_
#define LARDER_TOOLS_STREAM_CLAIRVOYANT_H_

#include <cstdint>

#include "client/core/stream_controller.h"
#include "tools/stream/scenario.h"
#include "tools/stream/trace.h"

namespace larder::stream {

struct ClairvoyantBound {
  bool meets = false;     // some schedule may; false: none can
  double divergence = 0;  // mean; no schedule that meets has less
  uint32_t recomputed = 0;
  uint32_t usable = 0;  // no schedule has more chunks there by the deadline
};

// What nobody can beat who knows the whole trace and how fast the engine is.
// A bound: no schedule need attain it, and none is better, because
//   - the link brings no more than the bytes between one round trip after the
//     start and one decoding before the deadline;
//   - no schedule has recomputed more chunks by the deadline than the one that
//     works from the front without a pause: wherever the j-th chunk that a
//     schedule recomputes lies, it is at j or behind, where (by the prefill
//     model) chunks cost no less. All g of them are taken to be exact;
//     For whether the deadline can be met: of all sets of chunks that the
//     engine has time for, in any order, the one that saves the link most
//     bytes;
//   - the rest is a multiple-choice knapsack. Of which chunks is relaxed to the
//     n - g smallest (sizes are in the same order for all planes, as MakeCase
//     makes them), and it is solved to no less than: dynamic programming over
//     bytes rounded down, or the fractional optimum, whichever is higher.
ClairvoyantBound Clairvoyant(const Case& load, const BandwidthTrace& trace,
                             double worst_divergence);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_CLAIRVOYANT_H_
