// Garbage collection: empties the file that holds the most that is dead by
// appending what lives in it anew. Runs in steps in the housekeeper task.

#include <algorithm>
#include <cassert>

#include "store/checksum.h"
#include "tiers/nvme/outbox.h"
#include "tiers/nvme/segment_log.h"

namespace larder {

bool SegmentLog::CollectorDueLocked(Outbox& out) {
  if (collection_.moving > 0) return false;
  const bool urgent = !waiting_[static_cast<size_t>(Head::kUser)].empty() &&
                      heads_[static_cast<size_t>(Head::kUser)] == nullptr &&
                      !MayCreateLocked(Head::kUser);
  if (collection_.victim == nullptr) {
    collection_.victim = PickVictimLocked(urgent);
    if (collection_.victim == nullptr) return false;
    collection_.victim->moves = 1;
    collection_.cursor = 0;
    collection_.controls_moved = false;
    collection_.failed = false;
  }
  if (clock_.Now() < collection_.not_before &&
      (!urgent || collection_.backing_off)) {
    HousekeepAtLocked(collection_.not_before, out);
    return false;
  }
  return true;
}

// All files have the same size: what lives least frees the most for the least.
SegmentFile* SegmentLog::PickVictimLocked(bool urgent) {
  const uint64_t usable = SegmentFile::UsableBytes(options_.segment_file_bytes);
  SegmentFile* best = nullptr;
  bool best_condemned = false;
  for (const auto& [number, file] : files_) {
    const bool condemned = file->state == SegmentFile::State::kCondemned;
    if ((!condemned && file->state != SegmentFile::State::kSealed) ||
        !file->unsettled.empty()) {
      continue;
    }
    if (best == nullptr || (condemned && !best_condemned) ||
        (condemned == best_condemned && file->live_bytes < best->live_bytes)) {
      best = file.get();
      best_condemned = condemned;
    }
  }
  if (best == nullptr || best_condemned) return best;
  const uint64_t gain = usable - std::min(usable, best->live_bytes);
  if (urgent) return gain > 0 ? best : nullptr;
  const bool wanted =
      SpareFilesLocked() < static_cast<int64_t>(options_.gc_free_files);
  return wanted && gain >= usable / 8 ? best : nullptr;
}

// The next live records of the victim, at most a step of them, in file order.
std::vector<SegmentLog::Candidate> SegmentLog::GatherLocked() {
  Collection& c = collection_;
  std::vector<Candidate> candidates;
  uint64_t bytes = 0;
  while (c.cursor < c.victim->locations.size()) {
    const uint32_t index = c.victim->locations[c.cursor];
    const Location& location = locations_[index];
    const uint64_t size = (uint64_t{location.pages} + 1) * kPageBytes;
    const bool lives = location.state == Location::State::kLive &&
                       location.file == c.victim->header.file_number;
    if (lives && bytes > 0 && bytes + size > options_.gc_step_bytes) break;
    if (lives) {
      candidates.push_back(
          {locations_.HandleOf(index), location.page, location.pages});
      bytes += size;
    }
    ++c.cursor;
  }
  std::sort(
      candidates.begin(), candidates.end(),
      [](const Candidate& a, const Candidate& b) { return a.page < b.page; });
  if (c.memory.size() < bytes) c.memory = PageMemory(bytes);
  return candidates;
}

// Appends copies of the controls and lists of deaths that live in the victim.
void SegmentLog::GatherControlsLocked(Outbox& out) {
  SegmentFile& victim = *collection_.victim;
  const uint32_t number = victim.header.file_number;
  for (const SegmentFile::ControlPlace& place : victim.controls) {
    Append* append = nullptr;
    if (place.kind == FrameKind::kDeaths) {
      const auto it = death_lists_.find(place.deaths);
      if (it == death_lists_.end() || it->second.file != number ||
          it->second.page != place.page) {
        continue;
      }
      append =
          NewDeathsLocked(it->second.deaths, place.deaths, Head::kCollector);
    } else {
      const auto it = controls_.find(place.key);
      if (it == controls_.end() || it->second.sequence == 0 ||
          it->second.file != number || it->second.page != place.page) {
        continue;
      }
      ControlState& state = it->second;
      if (state.value.empty() && state.copies == 1) {
        // A deletion of which no older value is left in any file.
        state.sequence = 0;
        victim.live_bytes -= ChargeOf(state.pages);
        control_bytes_ -= ChargeOf(state.pages);
        continue;
      }
      append = NewControlLocked({state.sequence, place.key, state.value},
                                Head::kCollector);
    }
    append->is_move = true;
    append->turn = Transfer::Class::kBackground;
    ++collection_.moving;
    EnqueueLocked(append, out);
  }
}

void SegmentLog::CollectStep() {
  Outbox out(*this);
  std::vector<Candidate> candidates;
  SegmentFile* victim = nullptr;
  MutableByteSpan memory;
  {
    absl::MutexLock lock(&mu_);
    victim = collection_.victim;
    collection_.backing_off = false;
    candidates = GatherLocked();
    memory = collection_.memory.span();
    if (!candidates.empty()) {
      ++collection_.moving;  // until this step has handed on all of its own
    } else if (!std::exchange(collection_.controls_moved, true)) {
      GatherControlsLocked(out);
    } else {
      EndCollectionLocked(out);
    }
  }
  out.Run();
  if (candidates.empty()) return;

  uint64_t at = 0;
  for (size_t i = 0; i < candidates.size();) {
    // Records that lie one after the other are read together.
    size_t end = i;
    uint64_t bytes = 0;
    do {
      bytes += (uint64_t{candidates[end].pages} + 1) * kPageBytes;
      ++end;
    } while (end < candidates.size() &&
             candidates[end].page ==
                 candidates[end - 1].page + 1 + candidates[end - 1].pages);
    const MutableByteSpan run = memory.subspan(at, bytes);
    at += bytes;
    const Status read = ReadAll(io_, victim->id,
                                uint64_t{candidates[i].page} * kPageBytes, run);
    uint64_t offset = 0;
    for (; i < end; ++i) {
      const uint64_t size = (uint64_t{candidates[i].pages} + 1) * kPageBytes;
      Status status = read;
      if (!read.ok()) {
        // One bad place must not cost its neighbours, nor one bad answer.
        status = ReadPatiently(io_, victim->id,
                               uint64_t{candidates[i].page} * kPageBytes,
                               run.subspan(offset, size));
      }
      MoveRecord(*victim, candidates[i], run.subspan(offset, size), status);
      offset += size;
    }
  }
  Outbox last(*this);
  {
    absl::MutexLock lock(&mu_);
    if (options_.gc_bytes_per_second > 0) {
      collection_.not_before =
          clock_.Now() +
          absl::Nanoseconds(static_cast<int64_t>(
              static_cast<double>(at) * 1e9 /
              static_cast<double>(options_.gc_bytes_per_second)));
    }
    MoveEndedLocked(absl::OkStatus(), last);
  }
  last.Run();
}

// Verifies what was read and appends it anew; what does not verify is lost.
void SegmentLog::MoveRecord(SegmentFile& victim, const Candidate& candidate,
                            MutableByteSpan memory, Status status) {
  Frame frame;
  if (status.ok()) {
    StatusOr<Frame> decoded =
        DecodeFrame(memory.first(kPageBytes), victim.header, candidate.page);
    status = decoded.status();
    if (decoded.ok()) frame = *decoded;
  }
  const MutableByteSpan record = memory.subspan(kPageBytes);
  if (status.ok() && (frame.kind != FrameKind::kPart ||
                      frame.pages() != candidate.pages + 1)) {
    status = absl::DataLossError("another record lies there");
  }
  if (status.ok()) {
    const StatusOr<RecordView> view =
        RecordView::Parse(record.first(frame.payload_bytes));
    status = view.ok() ? view->VerifyPayload() : view.status();
    if (status.ok() && view->meta() != frame.meta) {
      status = absl::DataLossError("frame and record disagree");
    }
  }
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    Location* location = locations_.Find(candidate.handle);
    if (location == nullptr || location->state != Location::State::kLive ||
        location->file != victim.header.file_number ||
        location->page != candidate.page) {
      // Freed meanwhile.
    } else if (status.ok()) {
      Append* append = NewAppendLocked();
      append->head = Head::kCollector;
      append->turn = Transfer::Class::kBackground;
      append->is_move = true;
      append->handle = candidate.handle;
      append->from_file = victim.header.file_number;
      append->from_page = candidate.page;
      append->frame.kind = FrameKind::kPart;
      append->frame.payload_bytes = frame.payload_bytes;
      append->frame.meta = frame.meta;
      append->record = record;
      ++collection_.moving;
      EnqueueLocked(append, out);
    } else if (absl::IsDataLoss(status)) {
      ++counters_.corrupt_records;
      location->state = Location::State::kLost;
      BuryLocked(location->file, location->page, /*has_row=*/true);
      ReduceLiveLocked(location->file, ChargeOf(location->pages), out);
    } else {
      collection_.failed = true;  // the medium may answer later
    }
  }
  out.Run();
}

void SegmentLog::MoveEndedLocked(const Status& status, Outbox& out) {
  if (!status.ok()) collection_.failed = true;
  assert(collection_.moving > 0);
  if (--collection_.moving == 0) WantHousekeepingLocked(out);
}

void SegmentLog::EndCollectionLocked(Outbox& out) {
  SegmentFile& victim = *std::exchange(collection_.victim, nullptr);
  victim.moves = 0;
  if (collection_.failed) {
    collection_.not_before = clock_.Now() + options_.retry_interval;
    collection_.backing_off = true;
  }
  SettledLocked(victim, out);
}

}  // namespace larder
