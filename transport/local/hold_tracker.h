#ifndef LARDER_TRANSPORT_LOCAL_HOLD_TRACKER_H_
#define LARDER_TRANSPORT_LOCAL_HOLD_TRACKER_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/types.h"
#include "transport/local/completion_port.h"

namespace larder {

// Turns the progress of one client's hold into completions, in the order that
// the client can follow: none before the answer that names the hold was sent,
// none after it was released. Owns the ring's room for them. Shared with the
// engine's callbacks. Thread-safe.
class HoldTracker {
 public:
  explicit HoldTracker(std::shared_ptr<CompletionPort> port)
      : port_(std::move(port)) {}

  // An engine call that may promote `room` chunks begins; the caller has
  // reserved that much. Called again before Answered: so much more.
  void Begin(uint32_t room) {
    absl::MutexLock lock(&mu_);
    answering_ = true;
    room_ += room;
    begun_ += room;
  }

  // Its answer was sent: `pending` of the chunks will report. The rest of the
  // room goes back.
  void Answered(HoldId hold, uint32_t pending) {
    absl::MutexLock lock(&mu_);
    hold_ = hold;
    answering_ = false;
    const uint32_t spare = begun_ - std::min(pending, begun_);
    room_ -= spare;
    begun_ = 0;
    for (const Report& report : early_) Emit(report);
    early_ = {};
    if (spare != 0) port_->Unreserve(spare);
  }

  void Progress(uint32_t index, MissReason reason) {
    absl::MutexLock lock(&mu_);
    Tell({index, reason, 0});
  }

  // Where the ring has no room for it, it is left out.
  void Layers(uint32_t index, uint32_t layers) {
    absl::MutexLock lock(&mu_);
    Tell({index, MissReason::kNone, layers});
  }

  void Released() {
    absl::MutexLock lock(&mu_);
    released_ = true;
    early_ = {};
    if (room_ != 0) port_->Unreserve(std::exchange(room_, 0));
  }

 private:
  struct Report {
    uint32_t index = 0;
    MissReason reason = MissReason::kNone;
    uint32_t layers = 0;  // 0: all of it, or why it will not come
  };

  void Tell(const Report& report) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (released_) return;
    if (answering_) {
      early_.push_back(report);
    } else {
      Emit(report);
    }
  }
  void Emit(const Report& report) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const bool layers = report.layers != 0;
    if (layers ? !port_->Reserve(1) : room_ == 0) return;
    if (!layers) --room_;
    port_->PushReserved({.request = Raw(hold_),
                         .kind = layers ? wire::Completion::kHoldLayers
                                        : wire::Completion::kHoldChunk,
                         .status = Raw(report.reason),
                         .value = report.index,
                         .layers = report.layers});
  }

  const std::shared_ptr<CompletionPort> port_;

  absl::Mutex mu_;
  HoldId hold_ ABSL_GUARDED_BY(mu_){};
  bool answering_ ABSL_GUARDED_BY(mu_) = false;
  bool released_ ABSL_GUARDED_BY(mu_) = false;
  uint32_t room_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t begun_ ABSL_GUARDED_BY(mu_) = 0;  // of it, by the call under way
  std::vector<Report> early_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_HOLD_TRACKER_H_
