#include "tiers/nvme/segment_log.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "store/checksum.h"
#include "tiers/nvme/outbox.h"

namespace larder {
namespace {

// Files that only garbage collection may use: one that it fills, one for the
// time when that is full and the file being emptied is not yet gone.
constexpr uint64_t kCollectorFiles = 2;

// Lists of deaths in the log, beyond which a Flush joins them.
constexpr size_t kMaxDeathLists = 64;

uint64_t PagesOf(uint64_t bytes) {
  return RoundUp(bytes, kPageBytes) / kPageBytes;
}

bool Aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kPageBytes == 0;
}

}  // namespace

void Append::Finish(const Status& status) {
  log.AppendEnded(this, status);
}
void LogRead::Finish(const Status& status) {
  log.ReadEnded(this, status);
}

SegmentLog::SegmentLog(const NvmeOptions& options, FileIo& io, Index& index,
                       Executor& executor, Clock& clock)
    : options_(options),
      max_files_(options.capacity_bytes / options.segment_file_bytes),
      io_(io),
      index_(index),
      executor_(executor),
      clock_(clock),
      queue_(io, options.queue_depth, options.io_bytes),
      sync_(*this) {}

SegmentLog::~SegmentLog() {
  Stop();
}

// --- Tasks -----------------------------------------------------------------

bool SegmentLog::Enter() {
  absl::MutexLock lock(&mu_);
  if (phase_ != Phase::kOpen) return false;
  ++tasks_running_;
  return true;
}

void SegmentLog::Leave() {
  absl::MutexLock lock(&mu_);
  --tasks_running_;
}

void SegmentLog::Post(void (SegmentLog::*work)()) {
  executor_.Post([weak = weak_from_this(), work] {
    const std::shared_ptr<SegmentLog> self = weak.lock();
    if (self == nullptr || !self->Enter()) return;
    (*self.*work)();
    self->Leave();
  });
}

void SegmentLog::PostAt(absl::Time when, void (SegmentLog::*work)()) {
  executor_.PostAt(when, [weak = weak_from_this(), work] {
    const std::shared_ptr<SegmentLog> self = weak.lock();
    if (self == nullptr || !self->Enter()) return;
    (*self.*work)();
    self->Leave();
  });
}

void SegmentLog::Open() {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kOpen;
    for (const auto& [number, file] : files_) SettledLocked(*file, out);
    WantHousekeepingLocked(out);
    if (!deletes_.empty()) WantCommitLocked(out);
  }
  out.Run();
}

bool SegmentLog::recovered() const {
  absl::MutexLock lock(&mu_);
  return phase_ != Phase::kNew;
}

void SegmentLog::Stop() {
  {
    absl::MutexLock lock(&mu_);
    if (phase_ == Phase::kStopped) return;
    phase_ = Phase::kStopped;
    mu_.Await(absl::Condition(
        +[](uint32_t* running) { return *running == 0; }, &tasks_running_));
  }
  queue_.Stop();  // every transfer ends, with what it came to or Cancelled
  const Status cancelled = absl::CancelledError("the tier is shutting down");
  std::vector<Tier::Done> dones;
  std::vector<FileId> files;
  {
    absl::MutexLock lock(&mu_);
    // Whatever had not been done by now never will be; what is durable all the
    // same is found again by Recover.
    for (const std::unique_ptr<Append>& append : all_appends_) {
      if (append->done) dones.push_back(std::move(append->done));
    }
    for (PendingFlush& flush : flushes_) dones.push_back(std::move(flush.done));
    flushes_.clear();
    for (const auto& [number, file] : files_) files.push_back(file->id);
  }
  for (Tier::Done& done : dones) std::move(done)(cancelled);
  for (const FileId file : files) io_.Close(file);
}

Status SegmentLog::ReadyLocked() const {
  switch (phase_) {
    case Phase::kNew:
      return absl::FailedPreconditionError(
          "the NVMe tier is not recovered yet");
    case Phase::kStopped:
      return absl::CancelledError("the tier is shutting down");
    case Phase::kOpen:
      break;
  }
  return absl::OkStatus();
}

// --- Room ------------------------------------------------------------------

uint64_t SegmentLog::MaxExtentBytes() const {
  return options_.segment_file_bytes / 4 & ~(kPageBytes - 1);
}

// How much may be charged to extents so that garbage collection always finds a
// file worth collecting: a file is closed when the next record does not fit,
// so at least all but the largest charge of every file is full; if all that is
// charged is less, some file holds something dead (README.md, "Room").
uint64_t SegmentLog::LimitLocked(uint64_t max_charge) const {
  const uint64_t usable = SegmentFile::UsableBytes(options_.segment_file_bytes);
  const uint64_t files = max_files_ - kCollectorFiles;
  const uint64_t charge =
      std::max(max_charge, ChargeOf(PagesOf(ControlPayloadBytes(
                               kMaxControlKeyBytes, kMaxControlValueBytes))));
  const double data = static_cast<double>(files * (usable - charge)) *
                          (1.0 - options_.gc_reserve_fraction) -
                      static_cast<double>(usable / 2);  // for controls
  return data > 0 ? static_cast<uint64_t>(data) : 0;
}

TierUsage SegmentLog::Usage() const {
  absl::MutexLock lock(&mu_);
  TierUsage usage;
  usage.capacity_bytes = LimitLocked(max_charge_);
  usage.used_bytes = used_bytes_;
  uint64_t occupied = 0;
  uint64_t live = 0;
  for (const auto& [number, file] : files_) {
    occupied += file->state == SegmentFile::State::kOpen
                    ? file->next_page * kPageBytes
                    : file->header.file_bytes;
    live += file->live_bytes;
  }
  usage.waste_bytes = occupied > live ? occupied - live : 0;
  return usage;
}

StatusOr<Extent> SegmentLog::Allocate(uint64_t bytes) {
  if (bytes == 0 || bytes > MaxExtentBytes()) {
    return absl::InvalidArgumentError(
        absl::StrCat("an extent of ", bytes, " bytes: must be 1 to ",
                     MaxExtentBytes(), " (a quarter of a segment file)"));
  }
  const uint64_t pages = PagesOf(bytes);
  const uint64_t charge = ChargeOf(pages);
  absl::MutexLock lock(&mu_);
  LARDER_RETURN_IF_ERROR(ReadyLocked());
  const uint64_t max_charge = std::max(max_charge_, charge);
  if (charged_bytes_ + charge > LimitLocked(max_charge)) {
    return absl::ResourceExhaustedError("the NVMe tier is full");
  }
  max_charge_ = max_charge;
  charged_bytes_ += charge;
  used_bytes_ += pages * kPageBytes;
  const uint32_t index = locations_.Add({
      .pages = static_cast<uint32_t>(pages),
      .state = Location::State::kReserved,
  });
  return Extent{locations_.HandleOf(index), pages * kPageBytes};
}

void SegmentLog::ReleaseLocked(Location& location) {
  charged_bytes_ -= ChargeOf(location.pages);
  used_bytes_ -= location.pages * kPageBytes;
}

// Remembers that a copy in the log is dead: its row goes with the next batch,
// its place into the next list of deaths.
void SegmentLog::BuryLocked(uint32_t file_number, uint32_t page, bool has_row) {
  if (has_row) deletes_.push_back({file_number, page});
  dead_.push_back({file_number, page});
}

SegmentFile* SegmentLog::FileLocked(uint32_t number) const {
  const auto it = files_.find(number);
  return it == files_.end() ? nullptr : it->second.get();
}

void SegmentLog::ReduceLiveLocked(uint32_t file_number, uint64_t charge,
                                  Outbox& out) {
  SegmentFile* file = FileLocked(file_number);
  if (file == nullptr) return;
  assert(file->live_bytes >= charge);
  file->live_bytes -= charge;
  SettledLocked(*file, out);
}

// Looks whether a file's state has to change, now that something in it ended.
void SegmentLog::SettledLocked(SegmentFile& file, Outbox& out) {
  using State = SegmentFile::State;
  if (!file.unsettled.empty()) return;
  if ((file.state == State::kSealed || file.state == State::kCondemned ||
       (file.state == State::kFull && !file.sealing)) &&
      file.live_bytes == 0 && file.moves == 0) {
    file.state = State::kDoomed;
  }
  if ((file.state == State::kDoomed && file.reads == 0) ||
      file.state == State::kFull) {
    WantHousekeepingLocked(out);
  }
}

void SegmentLog::Free(Extent extent) {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    Location* location = locations_.Find(extent.handle);
    if (location == nullptr || location->state == Location::State::kCancelled) {
      return;  // a mistake of the caller's; nothing of anyone's is touched
    }
    ReleaseLocked(*location);
    switch (location->state) {
      case Location::State::kWriting: {
        location->state = Location::State::kCancelled;
        // If it has no place yet it never gets one.
        auto& waiting = waiting_[static_cast<size_t>(Head::kUser)];
        const auto it = std::find_if(
            waiting.begin(), waiting.end(),
            [&](const Append* a) { return a->handle == extent.handle; });
        if (it != waiting.end()) {
          Append* append = *it;
          waiting.erase(it);
          FailAppendLocked(append, absl::CancelledError("freed"), out);
        }
        break;
      }
      case Location::State::kLive: {
        const Location was = *location;
        locations_.Remove(locations_.IndexOf(location));
        BuryLocked(was.file, was.page, /*has_row=*/true);
        ReduceLiveLocked(was.file, ChargeOf(was.pages), out);
        if (!delete_timer_) {
          delete_timer_ = true;
          out.PostAt(clock_.Now() + options_.delete_interval,
                     &SegmentLog::DeleteTimer);
        }
        break;
      }
      default:
        locations_.Remove(locations_.IndexOf(location));
        break;
    }
  }
  out.Run();
}

// --- Reading ---------------------------------------------------------------

void SegmentLog::Read(Extent extent, uint64_t offset, MutableByteSpan into,
                      Tier::Done done) {
  Status refused;
  LogRead* read = nullptr;
  {
    absl::MutexLock lock(&mu_);
    refused = ReadyLocked();
    Location* location = locations_.Find(extent.handle);
    if (!refused.ok()) {
    } else if (location == nullptr) {
      refused = absl::InvalidArgumentError("read of an extent that is no more");
    } else if (into.empty() || offset % kPageBytes != 0 ||
               into.size() % kPageBytes != 0 || !Aligned(into.data()) ||
               into.size() > location->pages * kPageBytes ||
               offset > location->pages * kPageBytes - into.size()) {
      refused = absl::InvalidArgumentError(
          absl::StrCat("read of ", into.size(), " bytes at ", offset,
                       " of an extent of ", location->pages, " pages"));
    } else if (location->state == Location::State::kLost) {
      refused = absl::DataLossError("the record was lost");
    } else if (location->state != Location::State::kLive) {
      refused = absl::FailedPreconditionError("read of an unwritten extent");
    } else {
      if (free_reads_.empty()) {
        all_reads_.push_back(std::make_unique<LogRead>(*this));
        free_reads_.push_back(all_reads_.back().get());
      }
      read = free_reads_.back();
      free_reads_.pop_back();
      read->from = FileLocked(location->file);
      ++read->from->reads;
      read->done = std::move(done);
      read->kind = IoRequest::Kind::kRead;
      read->turn = Transfer::Class::kRead;
      read->file_id = read->from->id;
      read->offset = (uint64_t{location->page} + 1) * kPageBytes + offset;
      read->body = into;
    }
  }
  if (read == nullptr) {
    std::move(done)(std::move(refused));
    return;
  }
  queue_.Start(read);
}

void SegmentLog::ReadEnded(LogRead* read, const Status& status) {
  Outbox out(*this);
  Tier::Done done;
  {
    absl::MutexLock lock(&mu_);
    --read->from->reads;
    SettledLocked(*read->from, out);
    done = std::move(read->done);
    free_reads_.push_back(read);
  }
  out.Run();
  std::move(done)(status);
}

// --- Appending -------------------------------------------------------------

Append* SegmentLog::NewAppendLocked() {
  if (free_appends_.empty()) {
    all_appends_.push_back(std::make_unique<Append>(*this));
    free_appends_.push_back(all_appends_.back().get());
  }
  Append* append = free_appends_.back();
  free_appends_.pop_back();
  append->frame = {};
  append->head = Head::kUser;
  append->file = nullptr;
  append->handle = 0;
  append->is_move = false;
  append->kind = IoRequest::Kind::kWrite;
  append->turn = Transfer::Class::kWrite;
  append->ticket = ++last_ticket_;
  tickets_.insert(append->ticket);
  return append;
}

void SegmentLog::RecycleLocked(Append* append) {
  append->done = nullptr;
  append->control = {};
  append->deaths.clear();
  append->replaces.clear();
  append->payload = {};
  free_appends_.push_back(append);
}

void SegmentLog::Write(Extent extent, const RecordMeta& meta, ByteSpan record,
                       Tier::Done done) {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    Status refused = ReadyLocked();
    Location* location = locations_.Find(extent.handle);
    if (refused.ok() && location == nullptr) {
      refused =
          absl::InvalidArgumentError("write to an extent that is no more");
    } else if (refused.ok() &&
               (meta.record_bytes == 0 ||
                record.size() != RoundUp(meta.record_bytes, kPageBytes) ||
                record.size() > location->pages * kPageBytes ||
                !Aligned(record.data()))) {
      refused = absl::InvalidArgumentError(absl::StrCat(
          "a record of ", meta.record_bytes, " bytes in ", record.size(),
          " bytes of memory for an extent of ", location->pages, " pages"));
    } else if (refused.ok() && location->state != Location::State::kReserved) {
      refused = absl::FailedPreconditionError("the extent is already written");
    } else if (refused.ok()) {
      refused = refusing_;
    }
    if (!refused.ok()) {
      out.Call(std::move(done), std::move(refused));
    } else {
      if (record.size() < location->pages * kPageBytes) {
        ReleaseLocked(*location);  // what the record does not need
        location->pages = static_cast<uint32_t>(record.size() / kPageBytes);
        charged_bytes_ += ChargeOf(location->pages);
        used_bytes_ += record.size();
      }
      location->state = Location::State::kWriting;
      Append* append = NewAppendLocked();
      append->handle = extent.handle;
      append->frame.kind = FrameKind::kPart;
      append->frame.payload_bytes = meta.record_bytes;
      append->frame.meta = meta;
      append->record = {const_cast<std::byte*>(record.data()), record.size()};
      append->done = std::move(done);
      EnqueueLocked(append, out);
    }
  }
  out.Run();
}

void SegmentLog::EnqueueLocked(Append* append, Outbox& out) {
  append->record_pages = append->record.size() / kPageBytes;
  waiting_[static_cast<size_t>(append->head)].push_back(append);
  PlaceLocked(append->head, out);
}

// Gives what waits its place, as far as there is room at the head.
void SegmentLog::PlaceLocked(Head head, Outbox& out) {
  auto& waiting = waiting_[static_cast<size_t>(head)];
  SegmentFile*& file = heads_[static_cast<size_t>(head)];
  while (!waiting.empty()) {
    if (file != nullptr && !file->Fits(waiting.front()->record_pages)) {
      file->state = SegmentFile::State::kFull;
      SettledLocked(*file, out);
      file = nullptr;
    }
    if (file == nullptr) {
      WantHousekeepingLocked(out);  // makes the next one
      return;
    }
    Append* append = waiting.front();
    waiting.pop_front();
    PlaceAtLocked(append, *file, out);
  }
}

void SegmentLog::PlaceAtLocked(Append* append, SegmentFile& file, Outbox& out) {
  append->file = &file;
  Frame& frame = append->frame;
  frame.file_number = file.header.file_number;
  frame.page = file.next_page;
  frame.sequence = next_sequence_++;
  file.next_page += static_cast<uint32_t>(frame.pages());
  file.unsettled.insert(frame.page);
  if (frame.kind == FrameKind::kControl) {
    // A first writing gets its place in time here, a moved copy keeps it.
    if (append->control.sequence == 0)
      append->control.sequence = frame.sequence;
    EncodeControl(append->control, append->payload.span());
    ++controls_[append->control.key].copies;
  }
  if (frame.kind != FrameKind::kPart) {
    frame.payload_checksum =
        ComputeChecksum(append->payload.span().first(frame.payload_bytes));
    file.controls.push_back(
        {.page = frame.page,
         .pages = static_cast<uint32_t>(append->record_pages),
         .kind = frame.kind,
         .key = append->control.key,
         .deaths = append->deaths_number});
  }
  const size_t at = file.footer.size();
  file.footer.resize(at + kFooterEntryBytes);
  EncodeFooterEntry(frame, std::span<std::byte, kFooterEntryBytes>(
                               file.footer.data() + at, kFooterEntryBytes));
  const uint64_t bytes = frame.pages() * kPageBytes;
  writes_.device_bytes += bytes;
  if (append->head == Head::kCollector) {
    writes_.gc_bytes += bytes;
  } else if (frame.kind == FrameKind::kPart) {
    writes_.user_bytes += append->record.size();
  }
  append->file_id = file.id;
  append->offset = uint64_t{frame.page} * kPageBytes;
  append->header = append->frame_page.span();
  append->body = append->record;
  ++writes_under_way_;
  out.Start(append);
}

// Ends an append that holds nothing: it never got a place, or its bytes did
// not become durable.
void SegmentLog::FailAppendLocked(Append* append, const Status& status,
                                  Outbox& out) {
  Status answer = status;
  SegmentFile* file = append->file;
  if (file != nullptr) {
    file->unsettled.erase(append->frame.page);
    // It may be found after a restart all the same; it is not meant to.
    if (append->frame.kind == FrameKind::kPart) {
      BuryLocked(append->frame.file_number, append->frame.page, false);
    }
  }
  if (append->is_move) {
    MoveEndedLocked(status, out);
  } else if (append->handle != 0) {
    Location* location = locations_.Find(append->handle);
    if (location != nullptr) {
      if (location->state == Location::State::kCancelled) {
        locations_.Remove(locations_.IndexOf(location));
        answer = absl::CancelledError("freed while being written");
      } else {
        location->state = Location::State::kLost;
      }
    }
  } else if (append->frame.kind == FrameKind::kDeaths) {
    for (const Death& death : append->deaths) {
      dead_.push_back({death.file_number, death.page});
    }
  } else {
    control_bytes_ -= ChargeOf(append->record_pages);
  }
  out.Call(std::move(append->done), std::move(answer));
  TicketDoneLocked(append->ticket, status, out);
  RecycleLocked(append);
  if (file != nullptr) SettledLocked(*file, out);
}

void SegmentLog::AppendEnded(Append* append, const Status& status) {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    --writes_under_way_;
    SegmentFile& file = *append->file;
    if (phase_ == Phase::kStopped) {
      // Stop finishes all callbacks.
    } else if (!status.ok()) {
      CondemnLocked(file, status, out);
      FailAppendLocked(append, status, out);
    } else if (file.state == SegmentFile::State::kCondemned) {
      FailAppendLocked(append, file.condemned, out);
    } else {
      if (file.written.empty()) {
        file.first_written = clock_.Now();
        dirty_.push_back(&file);
      }
      file.written.push_back(append);
      file.written_bytes += append->frame.pages() * kPageBytes;
    }
    MaybeSyncLocked(out);
  }
  out.Run();
}

// --- Controls --------------------------------------------------------------

Append* SegmentLog::NewControlLocked(ControlRecord control, Head head) {
  Append* append = NewAppendLocked();
  append->head = head;
  append->frame.kind = FrameKind::kControl;
  append->frame.payload_bytes =
      ControlPayloadBytes(control.key.size(), control.value.size());
  append->payload = PageMemory(append->frame.payload_bytes);
  std::memset(append->payload.data(), 0, append->payload.size());
  append->record = append->payload.span();
  append->control = std::move(control);
  return append;
}

void SegmentLog::PutControl(std::string key, std::string value,
                            Tier::Done done) {
  if (key.empty() || key.size() > kMaxControlKeyBytes ||
      value.size() > kMaxControlValueBytes) {
    std::move(done)(absl::InvalidArgumentError(
        absl::StrCat("a control with a key of ", key.size(), " and a value of ",
                     value.size(), " bytes (at most ", kMaxControlKeyBytes,
                     " and ", kMaxControlValueBytes, ", the key not empty)")));
    return;
  }
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    const uint64_t charge =
        ChargeOf(PagesOf(ControlPayloadBytes(key.size(), value.size())));
    Status refused = ReadyLocked();
    if (refused.ok()) refused = refusing_;
    if (refused.ok() &&
        control_bytes_ + charge >
            SegmentFile::UsableBytes(options_.segment_file_bytes) / 2) {
      refused = absl::ResourceExhaustedError(
          "too many controls (pins, spaces) for this size of segment files");
    }
    if (!refused.ok()) {
      out.Call(std::move(done), std::move(refused));
    } else {
      control_bytes_ += charge;
      Append* append = NewControlLocked(
          {.key = std::move(key), .value = std::move(value)}, Head::kUser);
      append->done = std::move(done);
      EnqueueLocked(append, out);
    }
  }
  out.Run();
}

void SegmentLog::ForEachControl(DurableTier::Control control) {
  std::vector<std::pair<std::string, std::string>> all;
  {
    absl::MutexLock lock(&mu_);
    for (const auto& [key, state] : controls_) {
      if (!state.value.empty()) all.emplace_back(key, state.value);
    }
  }
  for (const auto& [key, value] : all) control(key, value);
}

// --- Flush -----------------------------------------------------------------

Append* SegmentLog::NewDeathsLocked(std::vector<Death> deaths, uint64_t number,
                                    Head head) {
  Append* append = NewAppendLocked();
  append->head = head;
  append->frame.kind = FrameKind::kDeaths;
  append->frame.payload_bytes = DeathsPayloadBytes(deaths.size());
  append->payload = PageMemory(append->frame.payload_bytes);
  std::memset(append->payload.data(), 0, append->payload.size());
  EncodeDeaths(deaths, append->payload.span());
  append->record = append->payload.span();
  append->deaths = std::move(deaths);
  append->deaths_number = number;
  return append;
}

// Writes the deaths that are in no list yet.
void SegmentLog::EnqueueDeathsLocked(Outbox& out) {
  std::vector<Death> deaths;
  for (const RowPlace& place : std::exchange(dead_, {})) {
    const SegmentFile* file = FileLocked(place.file_number);
    if (file == nullptr || file->state == SegmentFile::State::kDoomed) continue;
    deaths.push_back(
        {place.file_number, place.page, NoncePrefix(file->header.nonce)});
  }
  // So many short lists are made into few.
  std::vector<uint64_t> replaced;
  if (death_lists_.size() >= kMaxDeathLists) {
    for (const auto& [number, list] : death_lists_) {
      if (list.deaths.size() > kMaxDeathsPerRecord / 2) continue;
      if (deaths.size() + list.deaths.size() > kMaxDeathsPerRecord) break;
      deaths.insert(deaths.end(), list.deaths.begin(), list.deaths.end());
      replaced.push_back(number);
    }
  }
  for (size_t at = 0; at < deaths.size(); at += kMaxDeathsPerRecord) {
    const auto begin = deaths.begin() + static_cast<ptrdiff_t>(at);
    const auto end =
        deaths.begin() + static_cast<ptrdiff_t>(
                             std::min(at + kMaxDeathsPerRecord, deaths.size()));
    Append* append = NewDeathsLocked(std::vector<Death>(begin, end),
                                     next_deaths_number_++, Head::kUser);
    if (deaths.size() <= kMaxDeathsPerRecord) append->replaces = replaced;
    EnqueueLocked(append, out);
  }
}

void SegmentLog::Flush(Tier::Done done) {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    Status refused = ReadyLocked();
    if (refused.ok() && !dead_.empty()) refused = refusing_;
    if (!refused.ok()) {
      out.Call(std::move(done), std::move(refused));
    } else {
      EnqueueDeathsLocked(out);
      if (tickets_.empty()) {
        out.Call(std::move(done), absl::OkStatus());
      } else {
        flushes_.push_back({last_ticket_, std::move(done)});
      }
      if (!deletes_.empty()) WantCommitLocked(out);
      MaybeSyncLocked(out);
    }
  }
  out.Run();
}

void SegmentLog::TicketDoneLocked(uint64_t ticket, const Status& status,
                                  Outbox& out) {
  tickets_.erase(ticket);
  const bool cancelled = absl::IsCancelled(status);
  if (!status.ok() && !cancelled && !flushes_.empty() &&
      ticket <= flushes_.back().ticket) {
    flush_error_ = status;
  }
  while (!flushes_.empty() &&
         (tickets_.empty() || *tickets_.begin() > flushes_.front().ticket)) {
    out.Call(std::move(flushes_.front().done),
             std::exchange(flush_error_, absl::OkStatus()));
    flushes_.erase(flushes_.begin());
  }
}

// --- Observation -----------------------------------------------------------

Status SegmentLog::Health() const {
  absl::MutexLock lock(&mu_);
  if (!refusing_.ok()) return refusing_;
  return last_failure_;
}

DurableTier::WriteCounters SegmentLog::Writes() const {
  absl::MutexLock lock(&mu_);
  return writes_;
}

NvmeCounters SegmentLog::Counters() const {
  const IoQueue::Counters io = queue_.counters();
  absl::MutexLock lock(&mu_);
  NvmeCounters counters = counters_;
  counters.stale_completions = io.stale_completions;
  counters.short_completions = io.short_completions;
  counters.io_retries = io.retries;
  counters.io_errors = io.errors;
  counters.segment_files = files_.size();
  return counters;
}

// --- Recovery --------------------------------------------------------------

void SegmentLog::AdoptFile(AdoptedFile adopted) {
  absl::MutexLock lock(&mu_);
  auto file = std::make_unique<SegmentFile>();
  file->header = adopted.header;
  file->id = adopted.id;
  file->state =
      adopted.sealed ? SegmentFile::State::kSealed : SegmentFile::State::kFull;
  file->next_page = adopted.next_page;
  file->sealed_trailer = adopted.trailer;
  file->rows = adopted.rows;
  files_[adopted.header.file_number] = std::move(file);
}

void SegmentLog::AdoptIndexError(uint32_t file_number) {
  absl::MutexLock lock(&mu_);
  FileLocked(file_number)->index_complete = false;
}

void SegmentLog::AdoptFooter(uint32_t file_number,
                             std::vector<std::byte> footer) {
  absl::MutexLock lock(&mu_);
  FileLocked(file_number)->footer = std::move(footer);
}

Extent SegmentLog::AdoptPart(const Frame& frame) {
  absl::MutexLock lock(&mu_);
  SegmentFile& file = *FileLocked(frame.file_number);
  const auto pages = static_cast<uint32_t>(PagesOf(frame.payload_bytes));
  const uint32_t index = locations_.Add({
      .file = frame.file_number,
      .page = frame.page,
      .pages = pages,
      .state = Location::State::kLive,
  });
  file.locations.push_back(index);
  file.live_bytes += ChargeOf(pages);
  charged_bytes_ += ChargeOf(pages);
  used_bytes_ += pages * kPageBytes;
  max_charge_ = std::max(max_charge_, ChargeOf(pages));
  return {locations_.HandleOf(index), pages * kPageBytes};
}

void SegmentLog::AdoptControl(const Frame& frame, ControlRecord control) {
  absl::MutexLock lock(&mu_);
  SegmentFile& file = *FileLocked(frame.file_number);
  const auto pages = static_cast<uint32_t>(PagesOf(frame.payload_bytes));
  file.controls.push_back({.page = frame.page,
                           .pages = pages,
                           .kind = FrameKind::kControl,
                           .key = control.key});
  ControlState& state = controls_[control.key];
  ++state.copies;
  if (control.sequence <= state.sequence) return;  // older, or a copy
  if (state.sequence != 0) {
    FileLocked(state.file)->live_bytes -= ChargeOf(state.pages);
    control_bytes_ -= ChargeOf(state.pages);
  }
  file.live_bytes += ChargeOf(pages);
  control_bytes_ += ChargeOf(pages);
  state.sequence = control.sequence;
  state.file = frame.file_number;
  state.page = frame.page;
  state.pages = pages;
  state.value = std::move(control.value);
}

void SegmentLog::AdoptDeaths(const Frame& frame, std::vector<Death> deaths) {
  absl::MutexLock lock(&mu_);
  SegmentFile& file = *FileLocked(frame.file_number);
  const auto pages = static_cast<uint32_t>(PagesOf(frame.payload_bytes));
  const uint64_t number = next_deaths_number_++;
  file.controls.push_back({.page = frame.page,
                           .pages = pages,
                           .kind = FrameKind::kDeaths,
                           .deaths = number});
  if (deaths.empty()) return;
  file.live_bytes += ChargeOf(pages);
  death_lists_[number] = {.file = frame.file_number,
                          .page = frame.page,
                          .pages = pages,
                          .deaths = std::move(deaths)};
}

void SegmentLog::AdoptDead(uint32_t file_number, uint32_t page,
                           bool is_listed) {
  absl::MutexLock lock(&mu_);
  deletes_.push_back({file_number, page});
  if (!is_listed) dead_.push_back({file_number, page});
}

void SegmentLog::SetNext(uint64_t sequence, uint32_t file_number) {
  absl::MutexLock lock(&mu_);
  next_sequence_ = std::max(next_sequence_, sequence);
  next_file_number_ = std::max(next_file_number_, file_number);
}

}  // namespace larder
