#ifndef LARDER_TIERS_NVME_IO_QUEUE_H_
#define LARDER_TIERS_NVME_IO_QUEUE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/inlined_vector.h"
#include "absl/synchronization/mutex.h"

#include "store/file_io.h"
#include "store/status.h"
#include "store/units.h"

namespace larder {

// One read, write or sync of any length, made of pieces. Its owner fills in
// the public fields, starts it, and leaves it alone until Finish.
class Transfer {
 public:
  // Whose turn it is: classes take slots in turn, syncs first.
  enum class Class : uint8_t { kSync, kRead, kWrite, kBackground };
  static constexpr size_t kClasses = 4;

  virtual ~Transfer() = default;

  IoRequest::Kind kind = IoRequest::Kind::kRead;
  Class turn = Class::kRead;
  FileId file_id = FileId::kNone;
  uint64_t offset = 0;
  MutableByteSpan header;  // one page or nothing; lies before the body
  MutableByteSpan body;

 protected:
  // Every byte was transferred, or why not. Runs once, with no lock held; the
  // queue does not touch the transfer afterwards.
  virtual void Finish(const Status& status) = 0;

 private:
  friend class IoQueue;

  Transfer* next_ = nullptr;
  uint64_t issued_ = 0;  // bytes of head and body handed to pieces
  uint32_t outstanding_ = 0;
  bool queued_ = false;
  int error_ = 0;
};

// Splits transfers into pieces, keeps a bounded number of them under way, and
// believes no completion that it cannot account for: a completion names its
// slot and the slot's generation, so that a late or repeated one is counted and
// ignored; a short one is continued, never taken for a success; -EINTR and
// -EAGAIN are tried again a bounded number of times.
//
// Thread-safe. Allocates nothing per transfer. Beyond the depth, transfers wait
// in lists through themselves; their number is bounded by whoever owns them.
class IoQueue final : public IoSink {
 public:
  struct Counters {
    uint64_t stale_completions = 0;  // late or repeated: ignored
    uint64_t short_completions = 0;  // continued, or failed
    uint64_t retries = 0;
    uint64_t errors = 0;  // pieces that failed for good
  };
  // How often a piece is tried again without progress.
  static constexpr uint32_t kMaxAttempts = 32;

  // `piece_bytes` is a multiple of kPageBytes.
  IoQueue(FileIo& io, uint32_t depth, uint64_t piece_bytes);
  ~IoQueue() override;

  void Start(Transfer* transfer) ABSL_LOCKS_EXCLUDED(mu_);
  // Waits for what is under way and finishes every transfer, those that did
  // not complete with Cancelled. Nothing may be started any more.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  void Complete(uint64_t identity, int64_t result) override
      ABSL_LOCKS_EXCLUDED(mu_);

  Counters counters() const;

 private:
  struct Slot {
    Transfer* transfer = nullptr;  // null = free
    uint32_t generation = 0;
    uint32_t attempts = 0;
    IoRequest request;
  };
  struct List {
    Transfer* first = nullptr;
    Transfer* last = nullptr;
  };
  using Batch = absl::InlinedVector<IoRequest, 8>;
  enum class Verdict { kAgain, kDone };

  void PushLocked(Transfer* transfer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Transfer* PopLocked(size_t turn) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Transfer* NextLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void IssueLocked(Batch& batch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ResubmitLocked(uint32_t index, Batch& batch)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Verdict JudgeLocked(Slot& slot, int64_t result)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  FileIo& io_;
  const uint64_t piece_bytes_;

  mutable absl::Mutex mu_;
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mu_);
  std::vector<uint32_t> free_slots_ ABSL_GUARDED_BY(mu_);
  std::array<List, Transfer::kClasses> waiting_ ABSL_GUARDED_BY(mu_);
  size_t last_turn_ ABSL_GUARDED_BY(mu_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  Counters counters_ ABSL_GUARDED_BY(mu_);
};

// Translates what a medium answered.
Status IoError(IoRequest::Kind kind, int error);

// Blocking transfers of every byte, for start-up and housekeeping.
Status ReadAll(FileIo& io, FileId file, uint64_t offset, MutableByteSpan into);
// The same for bytes that must not be given up because of one bad answer.
Status ReadPatiently(FileIo& io, FileId file, uint64_t offset,
                     MutableByteSpan into);
Status WriteAll(FileIo& io, FileId file, uint64_t offset, ByteSpan from);
Status Sync(FileIo& io, FileId file);

}  // namespace larder

#endif  // LARDER_TIERS_NVME_IO_QUEUE_H_
