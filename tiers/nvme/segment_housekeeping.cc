// Files of the log come, are sealed, and go. All of this blocks on the file
// system and runs in the housekeeper task.

#include <openssl/rand.h>

#include <algorithm>
#include <cassert>
#include <cstring>

#include "tiers/nvme/outbox.h"
#include "tiers/nvme/segment_log.h"

namespace larder {

void SegmentLog::WantHousekeepingLocked(Outbox& out) {
  if (phase_ != Phase::kOpen || housekeeping_) return;
  housekeeping_ = true;
  out.Post(&SegmentLog::Housekeep);
}

// At the latest at `when`.
void SegmentLog::HousekeepAtLocked(absl::Time when, Outbox& out) {
  if (when >= housekeep_at_) return;
  housekeep_at_ = when;
  out.PostAt(when, &SegmentLog::HousekeepTimer);
}

void SegmentLog::HousekeepTimer() {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    housekeep_at_ = absl::InfiniteFuture();
    WantHousekeepingLocked(out);
  }
  out.Run();
}

// How many files users' records could still open.
int64_t SegmentLog::SpareFilesLocked() const {
  const bool collecting =
      heads_[static_cast<size_t>(Head::kCollector)] != nullptr;
  return static_cast<int64_t>(max_files_) - 2 -
         static_cast<int64_t>(files_.size()) + (collecting ? 1 : 0);
}

// Garbage collection always may: each file it fills has emptied another.
bool SegmentLog::MayCreateLocked(Head head) const {
  return head == Head::kCollector || SpareFilesLocked() > 0;
}

void SegmentLog::Housekeep() {
  while (HousekeepOnce()) {
  }
}

// Does the one thing that is most urgent. False if there is nothing to do.
bool SegmentLog::HousekeepOnce() {
  enum class Job {
    kNone,
    kCreateUser,
    kCreateCollector,
    kSeal,
    kDelete,
    kCollect
  };
  Job job = Job::kNone;
  SegmentFile* file = nullptr;
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    if (phase_ != Phase::kOpen) {
      housekeeping_ = false;
      return false;
    }
    constexpr auto kUser = static_cast<size_t>(Head::kUser);
    constexpr auto kCollector = static_cast<size_t>(Head::kCollector);
    const absl::Time now = clock_.Now();
    const bool retry = !refusing_.ok() && now >= retry_at_;
    if (!refusing_.ok() && !retry) HousekeepAtLocked(retry_at_, out);
    if (retry && (heads_[kUser] != nullptr || !MayCreateLocked(Head::kUser))) {
      refusing_ = absl::OkStatus();
    }
    if (heads_[kUser] == nullptr && MayCreateLocked(Head::kUser) &&
        (retry || (refusing_.ok() && !waiting_[kUser].empty()))) {
      job = Job::kCreateUser;
    } else if (heads_[kCollector] == nullptr && !waiting_[kCollector].empty()) {
      job = Job::kCreateCollector;
    } else {
      for (const auto& [number, candidate] : files_) {
        if (candidate->state == SegmentFile::State::kDoomed &&
            candidate->reads == 0 && candidate->moves == 0 &&
            now >= candidate->retry_at) {
          job = Job::kDelete;
          file = candidate.get();
          break;
        }
        if (candidate->state == SegmentFile::State::kFull &&
            candidate->unsettled.empty()) {
          job = Job::kSeal;
          file = candidate.get();
        }
      }
      if (job == Job::kNone && CollectorDueLocked(out)) job = Job::kCollect;
    }
    if (job == Job::kNone) housekeeping_ = false;
    if (job == Job::kSeal) file->sealing = true;
  }
  out.Run();
  switch (job) {
    case Job::kNone:
      return false;
    case Job::kCreateUser:
      CreateHead(Head::kUser);
      break;
    case Job::kCreateCollector:
      CreateHead(Head::kCollector);
      break;
    case Job::kSeal:
      Seal(file);
      break;
    case Job::kDelete:
      DeleteFile(file);
      break;
    case Job::kCollect:
      CollectStep();
      break;
  }
  return true;
}

StatusOr<std::unique_ptr<SegmentFile>> SegmentLog::CreateFile(uint32_t number) {
  auto file = std::make_unique<SegmentFile>();
  file->header.file_number = number;
  file->header.file_bytes = options_.segment_file_bytes;
  if (RAND_bytes(reinterpret_cast<unsigned char*>(file->header.nonce.data()),
                 static_cast<int>(file->header.nonce.size())) != 1) {
    return absl::UnavailableError("no random bytes for a segment file");
  }
  const std::string name = SegmentFileName(number);
  LARDER_ASSIGN_OR_RETURN(file->id,
                          io_.Create(name, options_.segment_file_bytes));
  const PageMemory page(kPageBytes);
  EncodeFileHeader(file->header, page.span().first<kPageBytes>());
  Status status = WriteAll(io_, file->id, 0, page.span());
  if (status.ok()) status = Sync(io_, file->id);
  if (status.ok()) status = io_.SyncDirectory();
  if (!status.ok()) {
    io_.Close(file->id);
    // If this fails as well, recovery throws the empty file away.
    (void)io_.Delete(name);
    return Annotate(status, absl::StrCat("make ", name));
  }
  return file;
}

void SegmentLog::CreateHead(Head head) {
  uint32_t number = 0;
  {
    absl::MutexLock lock(&mu_);
    number = next_file_number_++;
  }
  StatusOr<std::unique_ptr<SegmentFile>> file = CreateFile(number);
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    if (file.ok()) {
      writes_.device_bytes += kPageBytes;
      SegmentFile*& slot = heads_[static_cast<size_t>(head)];
      slot = file->get();
      files_[number] = *std::move(file);
      if (head == Head::kUser) refusing_ = absl::OkStatus();
      PlaceLocked(head, out);
    } else if (head == Head::kUser) {
      RefuseLocked(file.status(), out);
    } else {
      // Writes go on while they find room; collecting is tried again later.
      last_failure_ = file.status();
      collection_.not_before = clock_.Now() + options_.retry_interval;
      auto& waiting = waiting_[static_cast<size_t>(Head::kCollector)];
      while (!waiting.empty()) {
        Append* append = waiting.front();
        waiting.pop_front();
        FailAppendLocked(append, file.status(), out);
      }
      // Writes that wait for what cannot be collected must not wait for ever.
      if (heads_[static_cast<size_t>(Head::kUser)] == nullptr &&
          !MayCreateLocked(Head::kUser)) {
        RefuseLocked(file.status(), out);
      }
    }
  }
  out.Run();
}

// Writes fail from now on, those that wait as well, until a retry succeeds.
void SegmentLog::RefuseLocked(const Status& why, Outbox& out) {
  refusing_ = why;
  retry_at_ = clock_.Now() + options_.retry_interval;
  HousekeepAtLocked(retry_at_, out);
  auto& waiting = waiting_[static_cast<size_t>(Head::kUser)];
  while (!waiting.empty()) {
    Append* append = waiting.front();
    waiting.pop_front();
    FailAppendLocked(append, why, out);
  }
}

void SegmentLog::Seal(SegmentFile* file) {
  PageMemory entries;
  Trailer trailer;
  FileHeader header;
  {
    absl::MutexLock lock(&mu_);
    header = file->header;
    trailer.file_number = header.file_number;
    trailer.footer_page = file->next_page;
    trailer.entry_count = file->entry_count();
    entries = PageMemory(file->footer.size());
    std::memcpy(entries.data(), file->footer.data(), file->footer.size());
  }
  std::memset(entries.data() + trailer.entries_bytes(), 0,
              entries.size() - trailer.entries_bytes());
  trailer.entries_checksum = FooterChecksum(
      entries.span().first(trailer.entries_bytes()), header.nonce);
  const PageMemory page(kPageBytes);
  EncodeTrailer(trailer, header.nonce, page.span().first<kPageBytes>());
  Status status =
      WriteAll(io_, file->id, uint64_t{trailer.footer_page} * kPageBytes,
               entries.span());
  if (status.ok()) {
    status =
        WriteAll(io_, file->id, header.file_bytes - kPageBytes, page.span());
  }
  if (status.ok()) status = Sync(io_, file->id);
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    file->sealing = false;
    if (status.ok()) {
      writes_.device_bytes += entries.size() + kPageBytes;
      file->state = SegmentFile::State::kSealed;
      file->sealed_trailer = trailer;
      file->footer = {};
      touched_.push_back(header.file_number);
      WantCommitLocked(out);
      SettledLocked(*file, out);
    } else {
      CondemnLocked(*file, status, out);
    }
  }
  out.Run();
}

void SegmentLog::DeleteFile(SegmentFile* file) {
  const uint32_t number = file->header.file_number;
  IndexBatch batch;
  batch.Delete(FileRowKey(number));
  batch.DeletePrefix(RowPrefix(kPartRows, number));
  batch.DeletePrefix(RowPrefix(kControlRows, number));
  const Status indexed = index_.Write(batch, /*sync=*/false);
  Status status = io_.Delete(SegmentFileName(number));
  if (absl::IsNotFound(status)) status = absl::OkStatus();  // a second try
  if (status.ok()) status = io_.SyncDirectory();
  if (status.ok()) io_.Close(file->id);
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    if (!indexed.ok()) ++counters_.index_errors;  // rows of no file: ignored
    if (status.ok()) {
      ForgetFileLocked(file, out);
      ++counters_.deleted_files;
    } else {
      last_failure_ = status;
      file->retry_at = clock_.Now() + options_.retry_interval;
      HousekeepAtLocked(file->retry_at, out);
    }
  }
  out.Run();
}

void SegmentLog::ForgetFileLocked(SegmentFile* file, Outbox& out) {
  const uint32_t number = file->header.file_number;
  for (const SegmentFile::ControlPlace& place : file->controls) {
    if (place.kind != FrameKind::kControl) continue;
    const auto it = controls_.find(place.key);
    if (it != controls_.end() && --it->second.copies == 0) controls_.erase(it);
  }
  std::erase_if(dead_, [&](const RowPlace& place) {
    return place.file_number == number;
  });
  for (auto it = death_lists_.begin(); it != death_lists_.end();) {
    DeathList& list = it->second;
    std::erase_if(list.deaths, [&](const Death& death) {
      return death.file_number == number;
    });
    if (list.deaths.empty()) {
      const uint32_t in_file = list.file;
      const uint64_t charge = ChargeOf(list.pages);
      it = death_lists_.erase(it);
      ReduceLiveLocked(in_file, charge, out);
    } else {
      ++it;
    }
  }
  files_.erase(number);
}

}  // namespace larder
