#include "store/cluster/record_read.h"

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace larder {
namespace {

// From the first byte asked for to the last that can land.
class RecordRead : public std::enable_shared_from_this<RecordRead> {
 public:
  RecordRead(MutableByteSpan into, absl::AnyInvocable<void(Status) &&> done)
      : into_(into), done_(std::move(done)) {}

  void Start(const std::shared_ptr<Link>& link, ReadQuery query,
             absl::Time deadline, Executor& executor) {
    query.bytes = into_.size();
    {
      absl::MutexLock lock(&mu_);
      link_ = link;
      query.landing = landing_ = link->OpenLanding(
          into_, [self = shared_from_this()](uint64_t, uint64_t size) {
            self->OnLanded(size);
          });
    }
    CallOptions options;
    options.deadline = deadline;
    link->Call(Encode(query), options,
               [self = shared_from_this()](StatusOr<std::string> answer) {
                 self->OnAnswer(answer.status());
               });
    // One that answers and then sends nothing.
    executor.PostAt(deadline, [weak = weak_from_this()] {
      if (const auto late = weak.lock()) {
        late->End(absl::DeadlineExceededError("the bytes did not come"));
      }
    });
  }

 private:
  bool There() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return answered_ && landed_ >= into_.size();
  }
  void OnLanded(uint64_t size) {
    {
      absl::MutexLock lock(&mu_);
      landed_ += size;
      if (!There()) return;
    }
    End(absl::OkStatus());
  }
  void OnAnswer(const Status& status) {
    if (status.ok()) {
      absl::MutexLock lock(&mu_);
      answered_ = true;
      if (!There()) return;
    }
    End(status);
  }
  void End(Status status) {
    std::shared_ptr<Link> link;
    LandingId landing = 0;
    {
      absl::MutexLock lock(&mu_);
      link = std::exchange(link_, nullptr);
      landing = landing_;
    }
    if (link == nullptr) return;
    link->CloseLanding(landing,
                       [self = shared_from_this(), status = std::move(status)] {
                         std::move(self->done_)(status);
                       });
  }

  const MutableByteSpan into_;
  absl::AnyInvocable<void(Status) &&> done_;
  absl::Mutex mu_;
  std::shared_ptr<Link> link_ ABSL_GUARDED_BY(mu_);  // null: ended
  LandingId landing_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t landed_ ABSL_GUARDED_BY(mu_) = 0;
  bool answered_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

void ReadRecord(const std::shared_ptr<Link>& link, ReadQuery query,
                MutableByteSpan into, absl::Time deadline, Executor& executor,
                absl::AnyInvocable<void(Status) &&> done) {
  std::make_shared<RecordRead>(into, std::move(done))
      ->Start(link, std::move(query), deadline, executor);
}

}  // namespace larder
