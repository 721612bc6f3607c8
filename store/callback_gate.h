#ifndef LARDER_STORE_CALLBACK_GATE_H_
#define LARDER_STORE_CALLBACK_GATE_H_

#include <mutex>
#include <utility>

#include "store/engine.h"

namespace larder {

// A caller's callback that can be shut: once Close has returned on one thread,
// it does not run on any other, nor ever again, and what it owned is destroyed
// (by the last of its calls, if it closes its own gate). Calls are made one at
// a time; neither they nor Close under the engine's lock.
template <class Callback>
class CallbackGate {
 public:
  explicit CallbackGate(Callback callback) : callback_(std::move(callback)) {}

  template <class... Args>
  void Call(Args... args) {
    std::lock_guard<std::recursive_mutex> lock(mu_);
    if (closed_ || !callback_) return;
    ++depth_;
    callback_(args...);
    --depth_;
    if (closed_ && depth_ == 0) callback_ = nullptr;
  }
  void Close() {
    std::lock_guard<std::recursive_mutex> lock(mu_);
    closed_ = true;
    if (depth_ == 0) callback_ = nullptr;
  }

 private:
  std::recursive_mutex mu_;  // a callback may call back into the engine
  Callback callback_;
  int depth_ = 0;  // calls under way, one within another
  bool closed_ = false;
};

using ProgressGate = CallbackGate<HoldProgress>;
using LayersGate =
    CallbackGate<std::function<void(uint32_t index, uint32_t layers)>>;
using RevokedGate = CallbackGate<HoldRevoked>;

// Tells a saver how far its save is: every stage once and in order, whichever
// thread gets there first; kDelivered apart from the others.
class SaveTicket {
 public:
  SaveTicket(SaveProgress progress, bool want_durable, bool to_be_delivered)
      : progress_(std::move(progress)),
        want_durable_(want_durable),
        to_be_delivered_(to_be_delivered) {}

  bool want_durable() const { return want_durable_; }

  // Reports all stages up to `stage` that were not reported yet.
  void Reach(SaveStage stage) {
    std::lock_guard<std::recursive_mutex> lock(mu_);
    while (!done_ && next_ <= Raw(stage)) {
      const auto reached = static_cast<SaveStage>(next_++);
      done_ = reached == Last();
      Tell(reached, absl::OkStatus());
    }
  }

  // Reports the stages before `stage`, and that it failed. Nothing after that,
  // but what came of a delivery that was begun.
  void Fail(SaveStage stage, const Status& status) {
    std::lock_guard<std::recursive_mutex> lock(mu_);
    if (stage > SaveStage::kSourceReusable) {
      Reach(static_cast<SaveStage>(Raw(stage) - 1));
    }
    if (done_) return;
    done_ = true;
    if (next_ <= Raw(SaveStage::kVolatile)) to_be_delivered_ = false;
    Tell(stage, status);
  }

  // What came of it. REQUIRES: kVolatile was reached.
  void Deliver(const Status& status) {
    std::lock_guard<std::recursive_mutex> lock(mu_);
    if (!std::exchange(to_be_delivered_, false)) return;
    Tell(SaveStage::kDelivered, status);
  }

 private:
  SaveStage Last() const {
    return want_durable_ ? SaveStage::kDurable : SaveStage::kVolatile;
  }
  void Tell(SaveStage stage, const Status& status) {
    if (progress_) progress_(stage, status);
  }

  std::recursive_mutex mu_;
  SaveProgress progress_;
  const bool want_durable_;
  uint8_t next_ = Raw(SaveStage::kSourceReusable);
  bool done_ = false;
  bool to_be_delivered_;
};

}  // namespace larder

#endif  // LARDER_STORE_CALLBACK_GATE_H_
