#ifndef LARDER_TOOLS_STREAM_NAIVE_H_
#define LARDER_TOOLS_STREAM_NAIVE_H_

#include <cstdint>

#include "tools/stream/scenario.h"
#include "tools/stream/trace.h"

namespace larder::stream {

struct NaiveRun {
  bool met = false;
  double divergence = 0;  // mean over the chunks there by the deadline
  uint32_t usable = 0;    // chunks from the front on
};

// Every chunk in order, with so many planes.
NaiveRun FixedLevel(const Case& load, const BandwidthTrace& trace,
                    uint32_t planes);

// Every chunk in order as it is, 16 bits an element: exact.
NaiveRun AllRaw(const Case& load, const BandwidthTrace& trace,
                double raw_bytes_per_chunk);

// The rule that CacheGen published (SIGCOMM 2024, section 5.3), with a level
// for each number of planes, each an object of its own as there: per chunk,
// text for all that remains if recomputing it fits; else the best level whose
// size for all that remains fits at the throughput of the chunk before (the
// first time: the prior, or the middle level).
NaiveRun CacheGenRule(const Case& load, const BandwidthTrace& trace);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_NAIVE_H_
