#ifndef LARDER_TOOLS_REFERENCE_ENGINE_TIMELINE_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_TIMELINE_H_

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/status.h"

namespace larder::reference {

// Who was busy, from when to when.
enum class Track : uint8_t {
  kLoad,     // from one layer's landing to the next one's
  kDecode,   // of that, how long the loading thread computed: verifying,
             // decoding where the copy is coded, putting it into blocks
  kCompute,  // the engine: projections, attention, feed-forward
  kWait,     // the engine, for a layer
  kSave,     // the engine, copying KV into staging
};
inline constexpr int kTracks = 5;

// What happened when in one request, layer by layer. Thread-safe.
class Timeline {
 public:
  struct Event {
    Track track{};
    uint32_t layer = 0;
    double begin = 0;  // seconds from the start
    double end = 0;
  };

  Timeline() : start_(std::chrono::steady_clock::now()) {}

  double Now() const;
  void Add(Track track, uint32_t layer, double begin, double end)
      ABSL_LOCKS_EXCLUDED(mu_);
  // In the order of their beginnings.
  std::vector<Event> Events() const ABSL_LOCKS_EXCLUDED(mu_);
  // Seconds of a track, all layers together.
  double Sum(Track track) const;

  // For chrome://tracing and Perfetto ("JSON object format"): complete events,
  // one thread per track, times in microseconds. With the steady clock's time
  // at the start, so that processes of one machine can be put side by side.
  std::string ChromeTrace() const;
  // The same as a picture: a row per track, time to the right, layers in
  // colours from dark (the first) to light.
  std::string Svg(const std::string& title) const;

 private:
  const std::chrono::steady_clock::time_point start_;
  mutable absl::Mutex mu_;
  std::vector<Event> events_ ABSL_GUARDED_BY(mu_);
};

// A picture of several processes' timelines, one above the other, from what
// ChromeTrace said of each; tracks without events are left out. Time begins
// with the first event. InvalidArgument: one is no such trace.
struct NamedTrace {
  std::string name;
  std::string json;
};
StatusOr<std::string> DrawTraces(const std::string& title,
                                 std::span<const NamedTrace> traces);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_TIMELINE_H_
