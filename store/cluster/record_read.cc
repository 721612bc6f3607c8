#include "store/cluster/record_read.h"

#include <cstring>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace larder {
namespace {

// From the first byte asked for to the last that can land.
class RecordRead : public std::enable_shared_from_this<RecordRead> {
 public:
  RecordRead(const ChunkCipher* cipher, MutableByteSpan into,
             std::shared_ptr<LinkMeter> meter,
             absl::AnyInvocable<void(Status) &&> done)
      : cipher_(cipher),
        into_(into),
        meter_(std::move(meter)),
        done_(std::move(done)) {
    meter_->Begin();
  }

  void Start(const std::shared_ptr<Link>& link, NodeId node,
             const TenantPolicies& policies, ReadQuery query,
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
    std::string message = Encode(query);
    if (cipher_ != nullptr) question_ = message;
    PeerCalls::Replied replied =
        [self = shared_from_this()](const StatusOr<std::string>& answer) {
          self->OnAnswer(answer);
        };
    const Status sealed = policies.Seal(query.tenant, node, message, replied);
    if (!sealed.ok()) return End(sealed);
    link->Call(std::move(message), options, std::move(replied));
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
  void OnAnswer(const StatusOr<std::string>& answer) {
    const size_t wanted = cipher_ == nullptr ? 0 : sizeof seal_;
    if (answer.ok() && answer->size() != wanted) {
      return End(absl::InvalidArgumentError("an answer that fits no read"));
    }
    if (answer.ok()) {
      absl::MutexLock lock(&mu_);
      std::memcpy(&seal_, answer->data(), wanted);
      answered_ = true;
      if (!There()) return;
    }
    End(answer.status());
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
    meter_->End(status.ok() ? into_.size() : 0);
    link->CloseLanding(
        landing, [self = shared_from_this(), status = std::move(status)] {
          std::move(self->done_)(status.ok() ? self->Open() : status);
        });
  }
  // Nobody writes there any more: what is verified stays as it is.
  Status Open() {
    if (cipher_ == nullptr) return absl::OkStatus();
    ChunkCipher::Seal seal;
    {
      absl::MutexLock lock(&mu_);
      seal = seal_;
    }
    return cipher_->Decrypt(seal, question_, into_);
  }

  // Of a tenant with a key: what comes is bound to the question.
  const ChunkCipher* const cipher_;
  std::string question_;

  const MutableByteSpan into_;
  const std::shared_ptr<LinkMeter> meter_;
  absl::AnyInvocable<void(Status) &&> done_;
  absl::Mutex mu_;
  std::shared_ptr<Link> link_ ABSL_GUARDED_BY(mu_);  // null: ended
  LandingId landing_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t landed_ ABSL_GUARDED_BY(mu_) = 0;
  bool answered_ ABSL_GUARDED_BY(mu_) = false;
  ChunkCipher::Seal seal_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

void ReadRecord(const std::shared_ptr<Link>& link, NodeId node,
                const TenantPolicies& policies, ReadQuery query,
                MutableByteSpan into, absl::Time deadline, Executor& executor,
                std::shared_ptr<LinkMeter> meter,
                absl::AnyInvocable<void(Status) &&> done) {
  std::make_shared<RecordRead>(policies.CipherOf(query.tenant), into,
                               std::move(meter), std::move(done))
      ->Start(link, node, policies, std::move(query), deadline, executor);
}

}  // namespace larder
