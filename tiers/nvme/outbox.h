#ifndef LARDER_TIERS_NVME_OUTBOX_H_
#define LARDER_TIERS_NVME_OUTBOX_H_

#include <utility>

#include "absl/container/inlined_vector.h"

#include "tiers/nvme/segment_log.h"

namespace larder {

// Collects what a call decided under the lock of the log; Run does it when the
// lock has been given back. Allocates nothing in the usual case.
class SegmentLog::Outbox {
 public:
  explicit Outbox(SegmentLog& log) : log_(log) {}
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  void Start(Append* append) { appends_.push_back(append); }
  void Start(Transfer* transfer) { transfers_.push_back(transfer); }
  void Call(Tier::Done done, Status status) {
    if (done) calls_.emplace_back(std::move(done), std::move(status));
  }
  void Post(void (SegmentLog::*work)()) {
    tasks_.emplace_back(absl::InfinitePast(), work);
  }
  void PostAt(absl::Time when, void (SegmentLog::*work)()) {
    tasks_.emplace_back(when, work);
  }

  void Run() {
    for (Append* append : appends_) {
      EncodeFrame(append->frame, append->file->header.nonce,
                  append->frame_page.span().first<kPageBytes>());
      log_.queue_.Start(append);
    }
    for (Transfer* transfer : transfers_) log_.queue_.Start(transfer);
    for (const auto& [when, work] : tasks_) {
      if (when == absl::InfinitePast()) {
        log_.Post(work);
      } else {
        log_.PostAt(when, work);
      }
    }
    for (auto& [done, status] : calls_) std::move(done)(std::move(status));
  }

 private:
  SegmentLog& log_;
  absl::InlinedVector<Append*, 4> appends_;
  absl::InlinedVector<Transfer*, 2> transfers_;
  absl::InlinedVector<std::pair<absl::Time, void (SegmentLog::*)()>, 4> tasks_;
  absl::InlinedVector<std::pair<Tier::Done, Status>, 4> calls_;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_OUTBOX_H_
