#include "tiers/nvme/io_queue.h"

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace larder {
namespace {

// A transfer that ended before its last byte although nothing reported an
// error; no errno fits, so one that block devices never use.
constexpr int kEndedShort = ENODATA;

uint64_t TotalBytes(const Transfer& transfer) {
  return transfer.header.size() + transfer.body.size();
}

uint64_t Identity(uint32_t index, uint32_t generation) {
  return uint64_t{generation} << 32 | index;
}

// Drops `bytes` from the front of a request.
void Advance(IoRequest& request, uint64_t bytes) {
  request.offset += bytes;
  const uint64_t of_first = std::min<uint64_t>(bytes, request.first.size());
  request.first = request.first.subspan(of_first);
  request.second = request.second.subspan(bytes - of_first);
  if (request.first.empty()) std::swap(request.first, request.second);
}

}  // namespace

Status IoError(IoRequest::Kind kind, int error) {
  const char* doing = kind == IoRequest::Kind::kRead    ? "read"
                      : kind == IoRequest::Kind::kWrite ? "write"
                                                        : "sync";
  if (error == kEndedShort) {
    return absl::DataLossError(
        absl::StrCat(doing, ": the medium ended the transfer short"));
  }
  const std::string text =
      absl::StrCat(doing, ": ", std::generic_category().message(error));
  switch (error) {
    case ECANCELED:
      return absl::CancelledError(text);
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(
          absl::StrCat(text, " (free space on the file system)"));
    case EIO:
    case EILSEQ:
    case EREMOTEIO:
      return kind == IoRequest::Kind::kRead ? absl::DataLossError(text)
                                            : absl::UnavailableError(text);
    default:
      return absl::UnavailableError(text);
  }
}

IoQueue::IoQueue(FileIo& io, uint32_t depth, uint64_t piece_bytes)
    : io_(io), piece_bytes_(piece_bytes), slots_(depth) {
  for (uint32_t i = depth; i > 0; --i) free_slots_.push_back(i - 1);
  io_.SetSink(this);
}

IoQueue::~IoQueue() {
  Stop();
}

void IoQueue::PushLocked(Transfer* transfer) {
  List& list = waiting_[static_cast<size_t>(transfer->turn)];
  transfer->next_ = nullptr;
  transfer->queued_ = true;
  (list.last == nullptr ? list.first : list.last->next_) = transfer;
  list.last = transfer;
}

Transfer* IoQueue::PopLocked(size_t turn) {
  List& list = waiting_[turn];
  Transfer* transfer = list.first;
  list.first = transfer->next_;
  if (list.first == nullptr) list.last = nullptr;
  transfer->queued_ = false;
  return transfer;
}

// Syncs first, then the classes in turn.
Transfer* IoQueue::NextLocked() {
  if (waiting_[0].first != nullptr) return PopLocked(0);
  for (size_t i = 1; i < Transfer::kClasses; ++i) {
    const size_t turn = 1 + (last_turn_ + i - 1) % (Transfer::kClasses - 1);
    if (waiting_[turn].first != nullptr) {
      last_turn_ = turn;
      return PopLocked(turn);
    }
  }
  return nullptr;
}

void IoQueue::IssueLocked(Batch& batch) {
  while (!free_slots_.empty() && !stopped_) {
    Transfer* transfer = NextLocked();
    if (transfer == nullptr) return;
    const uint32_t index = free_slots_.back();
    free_slots_.pop_back();
    Slot& slot = slots_[index];
    slot.transfer = transfer;
    slot.attempts = 0;
    ++slot.generation;
    IoRequest& request = slot.request;
    request = {.kind = transfer->kind,
               .file = transfer->file_id,
               .offset = transfer->offset + transfer->issued_,
               .identity = Identity(index, slot.generation)};
    ++transfer->outstanding_;
    const uint64_t total = TotalBytes(*transfer);
    if (total > 0) {
      const bool with_header =
          transfer->issued_ == 0 && !transfer->header.empty();
      if (with_header) {
        request.first = transfer->header;
        transfer->issued_ = transfer->header.size();
      }
      const uint64_t at = transfer->issued_ - transfer->header.size();
      const MutableByteSpan piece = transfer->body.subspan(
          at, std::min<uint64_t>(piece_bytes_, transfer->body.size() - at));
      (with_header ? request.second : request.first) = piece;
      transfer->issued_ += piece.size();
      // Behind the others of its class, so that a large one delays no small.
      if (transfer->issued_ < total) PushLocked(transfer);
    }
    batch.push_back(request);
  }
}

void IoQueue::ResubmitLocked(uint32_t index, Batch& batch) {
  Slot& slot = slots_[index];
  ++slot.generation;
  slot.request.identity = Identity(index, slot.generation);
  batch.push_back(slot.request);
}

// Looks at a result of the slot's own request. Sets the transfer's error if it
// is one.
IoQueue::Verdict IoQueue::JudgeLocked(Slot& slot, int64_t result) {
  Transfer& transfer = *slot.transfer;
  const uint64_t want = slot.request.bytes();
  // A sync is never tried again, whatever it answered: the pages it failed on
  // count as clean from then on.
  if ((result == -EINTR || result == -EAGAIN) &&
      transfer.kind != IoRequest::Kind::kSync) {
    if (++slot.attempts <= kMaxAttempts) {
      ++counters_.retries;
      return Verdict::kAgain;
    }
  }
  if (result >= 0 && static_cast<uint64_t>(result) == want) {
    return Verdict::kDone;
  }
  int error = kEndedShort;
  if (result < 0) {
    error = static_cast<int>(-result);
  } else if (static_cast<uint64_t>(result) < want) {
    ++counters_.short_completions;
    // Continue at a page, so that O_DIRECT stays aligned.
    const uint64_t moved = static_cast<uint64_t>(result) & ~(kPageBytes - 1);
    if (moved > 0 || ++slot.attempts <= kMaxAttempts) {
      Advance(slot.request, moved);
      return Verdict::kAgain;
    }
  }
  ++counters_.errors;
  if (transfer.error_ == 0) transfer.error_ = error;
  return Verdict::kDone;
}

void IoQueue::Start(Transfer* transfer) {
  Batch batch;
  bool stopped = false;
  {
    absl::MutexLock lock(&mu_);
    transfer->issued_ = 0;
    transfer->outstanding_ = 0;
    transfer->error_ = 0;
    stopped = stopped_;
    if (!stopped) {
      PushLocked(transfer);
      IssueLocked(batch);
    }
  }
  if (stopped) {
    transfer->Finish(absl::CancelledError("the tier is shutting down"));
    return;
  }
  if (!batch.empty()) io_.Submit(batch);
}

void IoQueue::Complete(uint64_t identity, int64_t result) {
  Batch batch;
  Transfer* finished = nullptr;
  {
    absl::MutexLock lock(&mu_);
    const auto index = static_cast<uint32_t>(identity);
    if (index >= slots_.size() || slots_[index].transfer == nullptr ||
        slots_[index].generation != static_cast<uint32_t>(identity >> 32)) {
      ++counters_.stale_completions;
      return;
    }
    Slot& slot = slots_[index];
    const Verdict verdict = JudgeLocked(slot, result);
    if (verdict == Verdict::kAgain && !stopped_) {
      ResubmitLocked(index, batch);
    } else {
      if (verdict == Verdict::kAgain) slot.transfer->error_ = ECANCELED;
      Transfer* transfer = std::exchange(slot.transfer, nullptr);
      free_slots_.push_back(index);
      --transfer->outstanding_;
      // After an error the pieces that were not issued never will be; the
      // transfer leaves its list when its turn comes.
      if (transfer->error_ != 0) transfer->issued_ = TotalBytes(*transfer);
      if (transfer->queued_ && transfer->error_ != 0) {
        List& list = waiting_[static_cast<size_t>(transfer->turn)];
        List rest;
        std::swap(rest, list);
        for (Transfer* t = rest.first; t != nullptr;) {
          Transfer* next = t->next_;
          if (t != transfer) PushLocked(t);
          t = next;
        }
        transfer->queued_ = false;
      }
      if (transfer->outstanding_ == 0 && !transfer->queued_) {
        finished = transfer;
      }
      IssueLocked(batch);
    }
  }
  if (!batch.empty()) io_.Submit(batch);
  if (finished != nullptr) {
    const int error = finished->error_;
    finished->Finish(error == 0 ? absl::OkStatus()
                                : IoError(finished->kind, error));
  }
}

void IoQueue::Stop() {
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) return;
    stopped_ = true;
  }
  io_.SetSink(nullptr);
  // Nothing completes any more: what is left in slots was dropped.
  std::vector<Transfer*> left;
  {
    absl::MutexLock lock(&mu_);
    for (Slot& slot : slots_) {
      Transfer* transfer = std::exchange(slot.transfer, nullptr);
      if (transfer != nullptr && --transfer->outstanding_ == 0 &&
          !transfer->queued_) {
        left.push_back(transfer);
      }
    }
    for (size_t turn = 0; turn < Transfer::kClasses; ++turn) {
      while (waiting_[turn].first != nullptr) left.push_back(PopLocked(turn));
    }
  }
  for (Transfer* transfer : left) {
    transfer->Finish(absl::CancelledError("the tier is shutting down"));
  }
}

IoQueue::Counters IoQueue::counters() const {
  absl::MutexLock lock(&mu_);
  return counters_;
}

namespace {

template <typename Step>
Status MoveAll(IoRequest::Kind kind, uint64_t bytes, Step step) {
  uint64_t moved = 0;
  uint32_t attempts = 0;
  while (moved < bytes) {
    const int64_t result = step(moved);
    const bool again = result == -EINTR || result == -EAGAIN;
    if (result < 0 && !again) {
      return IoError(kind, static_cast<int>(-result));
    }
    const uint64_t pages =
        again ? 0 : static_cast<uint64_t>(result) & ~(kPageBytes - 1);
    if (static_cast<uint64_t>(result) > bytes - moved && !again) {
      return IoError(kind, kEndedShort);
    }
    if (pages == 0 && ++attempts > IoQueue::kMaxAttempts) {
      return IoError(kind,
                     result < 0 ? static_cast<int>(-result) : kEndedShort);
    }
    moved += pages;
  }
  return absl::OkStatus();
}

}  // namespace

Status ReadAll(FileIo& io, FileId file, uint64_t offset, MutableByteSpan into) {
  return MoveAll(IoRequest::Kind::kRead, into.size(), [&](uint64_t moved) {
    return io.ReadNow(file, offset + moved, into.subspan(moved));
  });
}

Status ReadPatiently(FileIo& io, FileId file, uint64_t offset,
                     MutableByteSpan into) {
  constexpr int kAttempts = 3;
  Status status;
  for (int i = 0; i < kAttempts; ++i) {
    status = ReadAll(io, file, offset, into);
    if (status.ok()) break;
  }
  return status;
}

Status WriteAll(FileIo& io, FileId file, uint64_t offset, ByteSpan from) {
  return MoveAll(IoRequest::Kind::kWrite, from.size(), [&](uint64_t moved) {
    return io.WriteNow(file, offset + moved, from.subspan(moved));
  });
}

Status Sync(FileIo& io, FileId file) {
  const int64_t result = io.SyncNow(file);
  if (result < 0) {
    return IoError(IoRequest::Kind::kSync, static_cast<int>(-result));
  }
  return absl::OkStatus();
}

}  // namespace larder
