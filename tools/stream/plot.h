#ifndef LARDER_TOOLS_STREAM_PLOT_H_
#define LARDER_TOOLS_STREAM_PLOT_H_

#include <string>

#include "tools/stream/scenario.h"
#include "tools/stream/simulator.h"
#include "tools/stream/trace.h"

namespace larder::stream {

// One simulated load as an SVG picture: above, what the link gave and what the
// controller thought of it; below, what was fetched or recomputed when, a line
// a chunk.
std::string PlotRun(const std::string& title, const Case& load,
                    const BandwidthTrace& trace, const StreamRun& run);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_PLOT_H_
