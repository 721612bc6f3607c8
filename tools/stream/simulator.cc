#include "tools/stream/simulator.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <utility>

namespace larder::stream {
namespace {

using client::StreamAction;
using client::StreamActionKind;
using client::StreamController;

constexpr double kNever = std::numeric_limits<double>::infinity();

class Simulation {
 public:
  Simulation(const Case& about, const BandwidthTrace& trace,
             StreamController& controller, StreamRun& run)
      : case_(about),
        trace_(trace),
        controller_(controller),
        run_(run),
        waiting_since_(about.load.chunks.size(), kNever),
        arrived_(about.load.chunks.size()),
        usable_(about.load.chunks.size()) {}

  // Does what the controller says; false = it stopped.
  bool Act(const StreamAction& action) {
    switch (action.kind) {
      case StreamActionKind::kStop:
        return false;
      case StreamActionKind::kWait:
        wake_ = absl::ToDoubleSeconds(action.until - case_.load.start);
        return true;
      case StreamActionKind::kFetch:
        Ask(action);
        return true;
      case StreamActionKind::kAbandon:
        Abandon(action.fetch);
        return true;
      case StreamActionKind::kRecompute:
        for (uint32_t i = 0; i < action.count; ++i) {
          engine_.push_back(action.chunk + i);
        }
        if (engine_.size() == action.count) StartEngine();
        return true;
    }
    return false;
  }

  void Advance() {
    const double next = std::max(
        now_ + 1e-9, std::min({wake_, LinkDone(), trace_.NextChange(now_),
                               decoder_done_, engine_done_, NextServable()}));
    const double before = now_;
    now_ = next;
    Deliver(before);
    Decode();
    if (engine_done_ <= now_) FinishChunk();
  }

  double now() const { return now_; }
  absl::Time Now() const { return case_.load.start + absl::Seconds(now_); }

 private:
  struct Asked {
    uint32_t number = 0;
    double left = 0;
    uint64_t reported = 0;
    double servable = 0;
    StreamEvent event;
    uint64_t bytes = 0;
  };

  void Ask(const StreamAction& action) {
    Asked asked;
    asked.number = action.fetch;
    asked.bytes = action.bytes;
    asked.left = static_cast<double>(action.bytes);
    asked.servable = now_ + case_.round_trip;
    asked.event = {.chunk = action.chunk,
                   .plane = action.plane,
                   .offset = action.offset,
                   .asked = now_,
                   .begin = kNever};
    link_.push_back(asked);
    if (action.bytes == 0) Land(link_.size() - 1);
  }

  void Abandon(uint32_t number) {
    const auto at = std::find_if(
        link_.begin(), link_.end(),
        [&](const Asked& asked) { return asked.number == number; });
    if (at == link_.end()) return;
    Asked asked = *at;
    link_.erase(at);
    Report(asked);
    Record(asked, StreamEvent::Kind::kAbandoned);
    controller_.OnAbandoned(number, Now());
  }

  double NextServable() const {
    return link_.empty() || link_[0].servable <= now_ ? kNever
                                                      : link_[0].servable;
  }
  double LinkDone() const {
    if (link_.empty() || link_[0].servable > now_) return kNever;
    const double rate = trace_.RateAt(now_);
    return rate > 0 ? now_ + link_[0].left / rate : kNever;
  }

  // The rate did not change since `before`, and at most one fetch ended.
  void Deliver(double before) {
    if (link_.empty() || link_[0].servable > before + 1e-12) return;
    Asked& head = link_[0];
    const double bytes = trace_.RateAt(before) * (now_ - before);
    if (bytes > 0 && head.event.begin == kNever) head.event.begin = before;
    head.left -= bytes;
    // Half a byte is rounding.
    if (head.left < 0.5) {
      Land(0);
    } else {
      Report(head);
    }
  }

  void Report(Asked& asked) {
    const auto landed =
        static_cast<uint64_t>(static_cast<double>(asked.bytes) - asked.left);
    if (landed > asked.reported) {
      controller_.OnProgress(asked.number, landed - asked.reported, Now());
      asked.reported = landed;
    }
  }

  void Record(const Asked& asked, StreamEvent::Kind kind) {
    StreamEvent event = asked.event;
    event.kind = kind;
    event.bytes = asked.reported;
    event.end = now_;
    event.begin = std::min(event.begin, now_);
    run_.events.push_back(event);
  }

  void Land(size_t at) {
    Asked asked = link_[at];
    link_.erase(link_.begin() + static_cast<ptrdiff_t>(at));
    controller_.OnProgress(asked.number, asked.bytes - asked.reported, Now());
    asked.reported = asked.bytes;
    Record(asked, StreamEvent::Kind::kFetch);
    const uint32_t i = asked.event.chunk;
    arrived_[i] = asked.event.plane + 1;
    if (waiting_since_[i] == kNever) {
      waiting_since_[i] = now_;
      decoder_.push_back(i);
    }
    StartDecoder();
  }

  void StartDecoder() {
    if (decoder_.empty() || decoder_done_ != kNever) return;
    decoding_ = decoder_.front();
    decoder_.pop_front();
    waiting_since_[decoding_] = kNever;
    decoding_planes_ = arrived_[decoding_];
    decoder_done_ =
        now_ + absl::ToDoubleSeconds(
                   case_.load.chunks[decoding_].decode[decoding_planes_ - 1]);
  }

  void Decode() {
    if (decoder_done_ > now_) return;
    decoder_done_ = kNever;
    controller_.OnFetched(decoding_, decoding_planes_, Now());
    StartDecoder();
  }

  void StartEngine() {
    engine_began_ = now_;
    engine_done_ =
        engine_.empty() ? kNever : now_ + case_.recompute[engine_.front()];
  }

  void FinishChunk() {
    const uint32_t i = engine_.front();
    engine_.pop_front();
    run_.events.push_back({.kind = StreamEvent::Kind::kRecompute,
                           .chunk = i,
                           .asked = engine_began_,
                           .begin = engine_began_,
                           .end = now_});
    controller_.OnRecomputed(i, Now());
    StartEngine();
  }

  const Case& case_;
  const BandwidthTrace& trace_;
  StreamController& controller_;
  StreamRun& run_;
  double now_ = 0;
  double wake_ = 0;
  std::deque<Asked> link_;
  std::deque<uint32_t> decoder_, engine_;
  std::vector<double> waiting_since_;
  std::vector<uint32_t> arrived_, usable_;
  double decoder_done_ = kNever, engine_done_ = kNever, engine_began_ = 0;
  uint32_t decoding_ = 0, decoding_planes_ = 0;
};

}  // namespace

StreamRun Simulate(const Case& load, const BandwidthTrace& trace,
                   client::StreamOptions options, const ActionObserver& each) {
  StreamRun run;
  options.goodput.prior = load.prior;
  auto controller = StreamController::Create(load.load, options);
  if (!controller.ok()) return run;
  Simulation simulation(load, trace, *controller, run);
  for (;;) {
    const StreamAction action = controller->Next(simulation.Now());
    if (each) each(action, *controller, simulation.now());
    if (!simulation.Act(action)) break;
    if (action.kind == StreamActionKind::kWait) {
      simulation.Advance();
      run.estimates.push_back({simulation.now(), controller->goodput().Low(),
                               controller->goodput().Mid()});
    }
  }
  run.stopped = simulation.now();
  run.result = controller->Result();
  return run;
}

}  // namespace larder::stream
