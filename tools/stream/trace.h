#ifndef LARDER_TOOLS_STREAM_TRACE_H_
#define LARDER_TOOLS_STREAM_TRACE_H_

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace larder::stream {

// What a link gives, in bytes per second over seconds: steps of equal length;
// the last one lasts for ever.
class BandwidthTrace {
 public:
  // REQUIRES: rates not empty, none negative; step_seconds > 0.
  BandwidthTrace(std::vector<double> rates, double step_seconds);

  double RateAt(double seconds) const;
  // When the rate may change next.
  double NextChange(double seconds) const;
  double BytesBetween(double begin, double end) const;
  // When `bytes` that begin to flow at `begin` have come; infinite: never.
  double Delivered(double begin, double bytes) const;
  BandwidthTrace Scaled(double factor) const;

  double step_seconds() const { return step_seconds_; }
  const std::vector<double>& rates() const { return rates_; }

 private:
  size_t Step(double seconds) const;

  std::vector<double> rates_;
  double step_seconds_;
};

// A family of traces: shapes around 1 over the time until the deadline.
struct TraceKind {
  const char* name;
  const char* about;
  std::vector<double> (*steps)(std::mt19937_64& random);
};

// Steps from the start to the deadline; shapes go on for half as long again.
inline constexpr int kTraceSteps = 200;

// All of them, in a fixed order. The names are stable.
std::span<const TraceKind> TraceKinds();

// One trace: the shape from the seed, times `rate`, stretched to `deadline`
// seconds. The same arguments give the same trace.
BandwidthTrace MakeTrace(const TraceKind& kind, uint64_t seed, double rate,
                         double deadline_seconds);

}  // namespace larder::stream

#endif  // LARDER_TOOLS_STREAM_TRACE_H_
