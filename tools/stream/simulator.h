#ifndef LARDER_TOOLS_STREAM_SIMULATOR_H_
#define LARDER_TOOLS_STREAM_SIMULATOR_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "client/core/stream_controller.h"
#include "tools/stream/scenario.h"
#include "tools/stream/trace.h"

namespace larder::stream {

// What happened when, for plots and tests; seconds after the start.
struct StreamEvent {
  enum class Kind : uint8_t { kFetch, kAbandoned, kRecompute };
  Kind kind = Kind::kFetch;
  uint32_t chunk = 0;
  uint32_t plane = 0;
  uint64_t offset = 0;  // within the plane
  uint64_t bytes = 0;   // that landed
  double asked = 0;
  double begin = 0;  // of its first byte
  double end = 0;    // landed, or recomputed
};

struct StreamRun {
  client::StreamResult result;
  std::vector<StreamEvent> events;
  struct Estimate {
    double seconds = 0;
    double low = 0, mid = 0;
  };
  std::vector<Estimate> estimates;
  double stopped = 0;  // seconds after the start
};

using ActionObserver =
    std::function<void(const client::StreamAction&,
                       const client::StreamController&, double seconds)>;

// Plays a load: one link that answers fetches in their order, a round trip
// after they were asked for; one decoder, which takes the latest planes of the
// chunk that waits longest; one engine. `each` sees every action.
StreamRun Simulate(const Case& load, const BandwidthTrace& trace,
                   client::StreamOptions options,
                   const ActionObserver& each = nullptr);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_SIMULATOR_H_
