#include "tests/standin/schedule.h"

#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace larder::standin {
namespace {

thread_local bool in_host_function_now = false;

}  // namespace

EventState::~EventState() {
  if (shared != nullptr) munmap(shared, sizeof *shared);
  if (shared_fd >= 0) close(shared_fd);
}

bool Schedule::in_host_function() const {
  return in_host_function_now;
}

void Schedule::AddStream(const std::shared_ptr<StreamState>& stream) {
  streams_.push_back(stream);
}

void Schedule::RemoveStream(const std::shared_ptr<StreamState>& stream) {
  stream->destroyed = true;
  if (stream->capture != nullptr) stream->capture->invalid = true;
  if (stream->queue.empty()) std::erase(streams_, stream);
}

Result Schedule::Enqueue(const std::shared_ptr<StreamState>& stream, Step step,
                         std::vector<Position> after) {
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (capture.invalid) return Result::kStreamCaptureInvalidated;
    step.after = stream->frontier;
    stream->frontier = {static_cast<uint32_t>(capture.steps.size())};
    capture.steps.push_back(std::move(step));
    return Result::kSuccess;
  }
  if (stream == legacy_) {
    for (const auto& other : streams_) {
      if (other == legacy_ || !other->blocking) continue;
      if (other->capture != nullptr) {
        other->capture->invalid = true;
        return Result::kStreamCaptureImplicit;
      }
      after.push_back({other, other->enqueued});
    }
  } else if (stream->blocking) {
    after.push_back({legacy_, legacy_->enqueued});
  }
  StreamState::Operation operation;
  operation.steps.push_back(std::move(step));
  operation.begun.assign(1, false);
  operation.done.assign(1, false);
  operation.left = 1;
  operation.after = std::move(after);
  stream->queue.push_back(std::move(operation));
  ++stream->enqueued;
  return Result::kSuccess;
}

Result Schedule::EnqueueGraph(const std::shared_ptr<StreamState>& stream,
                              GraphExecState& graph) {
  if (stream->capture != nullptr) {
    // A graph within the graph: its first steps follow the stream's last.
    Capture& capture = *stream->capture;
    if (capture.invalid) return Result::kStreamCaptureInvalidated;
    const auto base = static_cast<uint32_t>(capture.steps.size());
    std::set<uint32_t> last;
    for (size_t i = 0; i < graph.steps.size(); ++i) {
      Step step = graph.steps[i];
      for (uint32_t& before : step.after) {
        before += base;
        last.erase(before);
      }
      if (step.after.empty()) step.after = stream->frontier;
      last.insert(base + static_cast<uint32_t>(i));
      capture.steps.push_back(std::move(step));
    }
    if (!last.empty()) stream->frontier.assign(last.begin(), last.end());
    return Result::kSuccess;
  }
  std::vector<Position> after;
  if (graph.last.has_value()) after.push_back(*graph.last);
  Step first;
  first.run = [] { return Result::kSuccess; };
  const Result result = Enqueue(stream, std::move(first), std::move(after));
  if (result != Result::kSuccess) return result;
  // The order with other streams is that of the operation just made.
  StreamState::Operation& operation = stream->queue.back();
  if (!graph.steps.empty()) {
    operation.steps = graph.steps;
    operation.begun.assign(graph.steps.size(), false);
    operation.done.assign(graph.steps.size(), false);
    operation.left = graph.steps.size();
  }
  graph.last = Position{stream, stream->enqueued};
  return Result::kSuccess;
}

void Schedule::Need(const Position& position, Needed& needed) const {
  if (Reached(position)) return;
  StreamState* const stream = position.stream.get();
  uint64_t seen = stream->completed;
  const auto known =
      std::find_if(needed.begin(), needed.end(),
                   [&](const auto& entry) { return entry.first == stream; });
  if (known != needed.end()) {
    if (known->second >= position.number) return;
    seen = known->second;
    known->second = position.number;
  } else {
    needed.emplace_back(stream, position.number);
  }
  for (uint64_t number = seen + 1; number <= position.number; ++number) {
    const auto& operation =
        stream->queue[static_cast<size_t>(number - stream->completed - 1)];
    for (const Position& before : operation.after) Need(before, needed);
  }
}

void Schedule::Finish(const std::shared_ptr<StreamState>& stream) {
  stream->queue.pop_front();
  ++stream->completed;
  if (stream->destroyed && stream->queue.empty()) std::erase(streams_, stream);
}

Schedule::Outcome Schedule::RunOne(Lock& lock, const Needed* needed) {
  struct Candidate {
    std::shared_ptr<StreamState> stream;
    size_t step;
  };
  std::vector<Candidate> candidates;
  bool waits = false;
  for (const auto& stream : streams_) {
    if (stream->queue.empty()) continue;
    if (needed != nullptr) {
      const auto found = std::find_if(
          needed->begin(), needed->end(),
          [&](const auto& entry) { return entry.first == stream.get(); });
      if (found == needed->end() || stream->completed >= found->second) {
        continue;
      }
    }
    StreamState::Operation& operation = stream->queue.front();
    if (!std::all_of(operation.after.begin(), operation.after.end(), Reached)) {
      continue;
    }
    for (size_t i = 0; i < operation.steps.size(); ++i) {
      if (operation.done[i]) continue;
      const Step& step = operation.steps[i];
      if (!std::all_of(
              step.after.begin(), step.after.end(),
              [&](uint32_t before) { return operation.done[before]; })) {
        continue;
      }
      if (operation.begun[i] || (step.ready && !step.ready())) {
        waits = true;
        continue;
      }
      candidates.push_back({stream, i});
    }
  }
  if (candidates.empty()) return waits ? Outcome::kWaits : Outcome::kNothing;
  const Candidate chosen = candidates[random_() % candidates.size()];
  const std::shared_ptr<StreamState> stream = chosen.stream;
  StreamState::Operation& operation = stream->queue.front();
  operation.begun[chosen.step] = true;
  // Others may queue meanwhile; the operation stays the first one.
  const Step& step = operation.steps[chosen.step];
  if (step.host) {
    // A copy: the queue may go with the context while it runs.
    const std::function<void()> host = step.host;
    lock.unlock();
    in_host_function_now = true;
    host();
    in_host_function_now = false;
    lock.lock();
    // Lost meanwhile: the queue is gone.
    if (lost_ != Result::kSuccess) return Outcome::kRan;
  } else if (const Result result = step.run(); result != Result::kSuccess) {
    Lose(result);
    return Outcome::kRan;
  }
  operation.done[chosen.step] = true;
  if (--operation.left == 0) Finish(stream);
  return Outcome::kRan;
}

Result Schedule::RunTo(Lock& lock, const Position& position) {
  const bool only_needed = random_() % 2 == 0;
  while (!Done(position)) {
    Outcome outcome;
    if (only_needed) {
      Needed needed;
      Need(position, needed);
      outcome = RunOne(lock, &needed);
      // What is waited for in memory comes from a stream that nobody named.
      if (outcome == Outcome::kWaits) outcome = RunOne(lock, nullptr);
    } else {
      outcome = RunOne(lock, nullptr);
    }
    if (outcome != Outcome::kRan) {
      // For somebody else: another thread's step, or a value in memory.
      lock.unlock();
      sched_yield();
      lock.lock();
    }
  }
  return lost_;
}

Result Schedule::RunUntil(Lock& lock, const std::function<bool()>& done) {
  while (lost_ == Result::kSuccess && !done()) {
    if (RunOne(lock, nullptr) != Outcome::kRan) {
      lock.unlock();
      sched_yield();
      lock.lock();
    }
  }
  return lost_;
}

Result Schedule::RunAll(Lock& lock) {
  std::vector<Position> last;
  for (const auto& stream : streams_)
    last.push_back({stream, stream->enqueued});
  std::shuffle(last.begin(), last.end(), random_);
  for (const Position& position : last) (void)RunTo(lock, position);
  return lost_;
}

void Schedule::RunSome(Lock& lock) {
  for (uint64_t steps = random_() % 4; steps > 0; --steps) {
    if (lost_ != Result::kSuccess ||
        RunOne(lock, nullptr) == Outcome::kNothing) {
      return;
    }
  }
}

void Schedule::Lose(Result code) {
  lost_ = code;
  for (const auto& stream : streams_) {
    stream->queue.clear();
    stream->completed = stream->enqueued;
    if (stream->capture != nullptr) stream->capture->invalid = true;
  }
  std::erase_if(streams_, [](const auto& stream) { return stream->destroyed; });
}

Result Schedule::BeginCapture(const std::shared_ptr<StreamState>& stream,
                              bool global) {
  if (stream == legacy_) return Result::kStreamCaptureUnsupported;
  if (stream->capture != nullptr) return Result::kIllegalState;
  auto capture = std::make_shared<Capture>();
  capture->origin = stream.get();
  capture->streams.insert(stream.get());
  capture->global = global;
  stream->capture = capture;
  stream->frontier.clear();
  active_.push_back(std::move(capture));
  ++captures_;
  return Result::kSuccess;
}

Result Schedule::EndCapture(const std::shared_ptr<StreamState>& stream,
                            std::vector<Step>* steps) {
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture == nullptr) return Result::kIllegalState;
  if (capture->origin != stream.get()) return Result::kStreamCaptureUnmatched;
  // Nothing may be left that the origin does not come after.
  std::vector<bool> followed(capture->steps.size(), false);
  for (const Step& step : capture->steps) {
    for (const uint32_t before : step.after) followed[before] = true;
  }
  for (const uint32_t last : stream->frontier) followed[last] = true;
  const bool joined =
      std::find(followed.begin(), followed.end(), false) == followed.end();
  for (const auto& other : streams_) {
    if (other->capture != capture) continue;
    other->capture = nullptr;
    other->frontier.clear();
  }
  std::erase(active_, capture);
  --captures_;
  if (capture->invalid) return Result::kStreamCaptureInvalidated;
  if (!joined) return Result::kStreamCaptureUnjoined;
  *steps = std::move(capture->steps);
  return Result::kSuccess;
}

Result Schedule::RefuseInCapture(bool global_only) {
  Result result = Result::kSuccess;
  for (const auto& capture : active_) {
    if (global_only && !capture->global) continue;
    capture->invalid = true;
    result = Result::kStreamCaptureUnsupported;
  }
  return result;
}

}  // namespace larder::standin
