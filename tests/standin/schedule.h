#ifndef LARDER_TESTS_STANDIN_SCHEDULE_H_
#define LARDER_TESTS_STANDIN_SCHEDULE_H_

// Streams, events and graphs of the stand-in device, and who runs next.
//
// Work is done as late as it can be: nothing runs in the call that asked for
// it, and a call that waits runs steps of streams drawn at random, half of the
// time only those that it needs. So work that nobody ordered is done in the
// wrong order sooner or later, and the seed says when.

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "kernels/cuda/driver_types.h"

namespace larder::standin {

using kernels::cuda::Result;

// One thing that the device does.
struct Step {
  // Under the schedule's lock. An error ends the context.
  std::function<Result()> run;
  // Without the lock; instead of `run`.
  std::function<void()> host;
  // Polled until true before it runs; empty: always.
  std::function<bool()> ready;
  // Steps of the same operation that come before it.
  std::vector<uint32_t> after;
};

class StreamState;

// A place in a stream: everything up to and with operation `number`.
struct Position {
  std::shared_ptr<StreamState> stream;
  uint64_t number = 0;
};

// What one capture has collected so far.
struct Capture {
  std::vector<Step> steps;
  StreamState* origin = nullptr;
  std::set<StreamState*> streams;
  bool invalid = false;
  bool global = false;
};

class StreamState {
 public:
  struct Operation {
    std::vector<Step> steps;
    std::vector<bool> begun;
    std::vector<bool> done;
    size_t left = 0;
    std::vector<Position> after;  // other streams'
  };

  bool blocking = true;    // ordered with the legacy default stream
  bool destroyed = false;  // goes when what is queued has run
  std::deque<Operation> queue;
  uint64_t enqueued = 0;
  uint64_t completed = 0;
  std::shared_ptr<Capture> capture;
  std::vector<uint32_t> frontier;  // of the capture: its last steps
};

// What other processes see of an event: a page of shared memory.
struct SharedEvent {
  uint64_t recorded = 0;
  uint64_t completed = 0;
};

struct EventState {
  unsigned flags = 0;
  std::optional<Position> recorded;
  int64_t time_ns = 0;  // when it last completed
  std::shared_ptr<Capture> capture;
  std::vector<uint32_t> frontier;
  int shared_fd = -1;
  SharedEvent* shared = nullptr;
  bool imported = false;
  ~EventState();
};

struct GraphState {
  std::vector<Step> steps;
};

struct GraphExecState {
  std::vector<Step> steps;
  std::optional<Position> last;  // launches of one graph follow each other
};

class Schedule {
 public:
  using Lock = std::unique_lock<std::mutex>;

  std::mutex& mutex() { return mutex_; }

  void Seed(uint64_t seed) { random_.seed(seed); }
  uint64_t Draw() { return random_(); }
  std::shared_ptr<StreamState> legacy() { return legacy_; }
  void AddStream(const std::shared_ptr<StreamState>& stream);
  void RemoveStream(const std::shared_ptr<StreamState>& stream);

  // Behind everything on the stream (in its capture, where one is under way)
  // and behind `after`.
  Result Enqueue(const std::shared_ptr<StreamState>& stream, Step step,
                 std::vector<Position> after = {});
  Result EnqueueGraph(const std::shared_ptr<StreamState>& stream,
                      GraphExecState& graph);

  static bool Reached(const Position& position) {
    return position.stream->completed >= position.number;
  }
  // Runs steps until the position is reached.
  Result RunTo(Lock& lock, const Position& position);
  Result RunAll(Lock& lock);
  // A few steps, as if time passed.
  void RunSome(Lock& lock);
  // Until `done`; the steps that run are any.
  Result RunUntil(Lock& lock, const std::function<bool()>& done);

  // The context is at its end: what was queued will never run.
  void Lose(Result code);
  Result lost() const { return lost_; }
  // A new context, on the same device.
  void Recover() { lost_ = Result::kSuccess; }

  bool capturing() const { return captures_ > 0; }
  Result BeginCapture(const std::shared_ptr<StreamState>& stream, bool global);
  Result EndCapture(const std::shared_ptr<StreamState>& stream,
                    std::vector<Step>* steps);
  // A call that must not be made while something is captured was made.
  Result RefuseInCapture(bool global_only);
  bool in_host_function() const;

 private:
  enum class Outcome : uint8_t { kRan, kWaits, kNothing };
  // How far each stream must come for a position to be reached.
  using Needed = std::vector<std::pair<StreamState*, uint64_t>>;
  void Need(const Position& position, Needed& needed) const;
  Outcome RunOne(Lock& lock, const Needed* needed);
  void Finish(const std::shared_ptr<StreamState>& stream);
  bool Done(const Position& position) const {
    return lost_ != Result::kSuccess || Reached(position);
  }

  std::mutex mutex_;
  std::mt19937_64 random_{1};
  std::shared_ptr<StreamState> legacy_ = std::make_shared<StreamState>();
  std::vector<std::shared_ptr<StreamState>> streams_{legacy_};
  std::vector<std::shared_ptr<Capture>> active_;
  int captures_ = 0;
  Result lost_ = Result::kSuccess;
};

}  // namespace larder::standin

#endif  // LARDER_TESTS_STANDIN_SCHEDULE_H_
