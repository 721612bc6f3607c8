#ifndef LARDER_TOOLS_STREAM_SCENARIO_H_
#define LARDER_TOOLS_STREAM_SCENARIO_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "client/core/stream_controller.h"

namespace larder::stream {

// What a codec makes of KV: planes, coarsest first.
struct PlaneModel {
  struct Plane {
    double bits = 0;  // per element, of this plane alone
    double kld = 0;   // mean divergence with this plane and those before it
  };
  std::vector<Plane> planes;  // 1..client::kStreamPlanesMax

  // KVC1 with steps of 1.2, 0.4 and 0.13 standard deviations: bits as in
  // codec.md 3.3, divergence for 1 bit more per plane as in 3.1. To be replaced
  // by what `larder bench quality` measures.
  static PlaneModel Default();
};

// A model, a machine and a prompt.
struct Geometry {
  const char* name;
  const char* about;
  uint32_t tokens = 0;
  uint32_t elements_per_token = 0;  // K and V, all layers
  double decode_elements = 0;       // per second, whichever planes
  double round_trip = 0;            // seconds
  double deadline = 0;              // seconds
  client::PrefillModel prefill;
};

inline constexpr uint32_t kChunkTokens = 256;

std::span<const Geometry> Geometries();

// What one simulated load is about.
struct Scenario {
  const Geometry* geometry = nullptr;
  bool engine = false;  // recomputing is offered
  double supply = 0;    // bytes of an even trace until the deadline, as a
                        // share of all planes of all chunks
  uint64_t seed = 0;
};

struct Case {
  client::StreamLoad load;        // what the controller is told
  double prior = 0;               // ... and what it believes of the link
  std::vector<double> recompute;  // seconds that the engine really takes
  double round_trip = 0;
  double deadline = 0;  // seconds after load.start
  double rate = 0;      // bytes per second where a trace says 1
};

// Scarce for most, plenty for some: even links that bring between 0.25 and 1.2
// of all planes (all that is the first plane is 0.3), with an engine that helps
// between 0.15 and 0.7, evenly in the logarithm.
double SupplyOf(bool engine, uint64_t seed);

// The same scenario gives the same case: sizes within some per cent of each
// other, an engine that is not quite as fast as its model says, and a prior
// that is missing (every third) or off by a factor of e^N(0, 0.5).
Case MakeCase(const Scenario& scenario, const PlaneModel& planes);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_SCENARIO_H_
