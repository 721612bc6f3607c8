// From written to durable: group commit and index rows.

#include <algorithm>
#include <cassert>

#include "tiers/nvme/outbox.h"
#include "tiers/nvme/segment_log.h"

namespace larder {

// --- Syncs -----------------------------------------------------------------

// Starts the next sync if it is time: nothing more is being written, enough
// has gathered, the oldest has waited long enough, or somebody flushes.
void SegmentLog::MaybeSyncLocked(Outbox& out) {
  if (sync_.under_way || dirty_.empty() || phase_ != Phase::kOpen) return;
  SegmentFile& file = *dirty_.front();
  const absl::Time due = file.first_written + options_.sync_interval;
  if (writes_under_way_ > 0 && file.written_bytes < options_.sync_bytes &&
      flushes_.empty() && clock_.Now() < due) {
    if (!sync_timer_) {
      sync_timer_ = true;
      out.PostAt(due, &SegmentLog::SyncTimer);
    }
    return;
  }
  dirty_.erase(dirty_.begin());
  sync_.of = &file;
  sync_.covered.swap(file.written);
  file.written.clear();
  file.written_bytes = 0;
  sync_.kind = IoRequest::Kind::kSync;
  sync_.turn = Transfer::Class::kSync;
  sync_.file_id = file.id;
  sync_.under_way = true;
  ++counters_.syncs;
  out.Start(static_cast<Transfer*>(&sync_));
}

void SegmentLog::SyncTimer() {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    sync_timer_ = false;
    MaybeSyncLocked(out);
  }
  out.Run();
}

void SegmentLog::SyncEnded(const Status& status) {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    sync_.under_way = false;
    std::vector<Append*> covered;
    covered.swap(sync_.covered);
    if (phase_ == Phase::kStopped) return;
    if (status.ok()) {
      // If the file was condemned meanwhile, then for a write that is not among
      // these: they are durable.
      if (sync_.of->state != SegmentFile::State::kCondemned) {
        last_failure_ = absl::OkStatus();
        condemned_in_a_row_ = 0;
      }
      synced_.insert(synced_.end(), covered.begin(), covered.end());
      WantCommitLocked(out);
    } else {
      ++counters_.failed_syncs;
      CondemnLocked(*sync_.of, status, out);
      for (Append* append : covered) FailAppendLocked(append, status, out);
    }
    MaybeSyncLocked(out);
  }
  out.Run();
}

// A write or sync failed. What this file holds durably stays readable until it
// has been moved away; what was not synced yet has failed with it, because the
// kernel may have dropped it and will not say so again.
void SegmentLog::CondemnLocked(SegmentFile& file, const Status& why,
                               Outbox& out) {
  if (file.state == SegmentFile::State::kCondemned) return;
  file.state = SegmentFile::State::kCondemned;
  last_failure_ = Annotate(
      why,
      absl::StrCat("segment file ", SegmentFileName(file.header.file_number)));
  ++counters_.condemned_files;
  for (SegmentFile*& head : heads_) {
    if (head == &file) head = nullptr;
  }
  std::erase(dirty_, &file);
  std::vector<Append*> written;
  written.swap(file.written);
  file.written_bytes = 0;
  file.condemned = last_failure_;
  for (Append* append : written) FailAppendLocked(append, last_failure_, out);
  // One bad file is rotated out; several in a row are a bad device.
  if (++condemned_in_a_row_ >= 3) {
    RefuseLocked(last_failure_, out);
  }
  SettledLocked(file, out);
  WantHousekeepingLocked(out);
}

// --- The committer ---------------------------------------------------------

void SegmentLog::WantCommitLocked(Outbox& out) {
  commit_wanted_ = true;
  if (committing_) return;
  committing_ = true;
  out.Post(&SegmentLog::Commit);
}

void SegmentLog::DeleteTimer() {
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    delete_timer_ = false;
    if (!deletes_.empty()) WantCommitLocked(out);
  }
  out.Run();
}

void SegmentLog::Commit() {
  while (CommitOnce()) {
  }
}

// Adds the rows of `appends` and takes away those of `deletes`, and states for
// every file touched what its rows now add up to. Changes no state, so that it
// can fail.
void SegmentLog::BuildBatchLocked(const std::vector<Append*>& appends,
                                  absl::btree_map<uint32_t, Tallies>& tallies,
                                  std::vector<RowPlace>& deletes,
                                  const std::vector<uint32_t>& touched,
                                  IndexBatch& batch) {
  const auto tally = [&](const SegmentFile& file) -> Tallies& {
    const auto [it, added] = tallies.try_emplace(file.header.file_number);
    if (added) it->second.after = file.rows;
    return it->second;
  };
  for (Append* append : appends) {
    SegmentFile& file = *append->file;
    Tallies& of = tally(file);
    of.put.push_back(append->frame.page);
    if (!file.index_complete) continue;
    const Frame& frame = append->frame;
    if (frame.kind != FrameKind::kPart) {
      const MutableByteSpan payload =
          append->payload.span().first(frame.payload_bytes);
      batch.Put(RowKey(kControlRows, frame.file_number, frame.page),
                std::string(reinterpret_cast<const char*>(payload.data()),
                            payload.size()));
    } else {
      batch.Put(RowKey(kPartRows, frame.file_number, frame.page),
                EncodePartRow(frame.sequence, frame.meta));
    }
    of.after.Add(frame.page);
  }
  for (const uint32_t number : touched) {
    if (const SegmentFile* file = FileLocked(number)) tally(*file);
  }
  std::erase_if(deletes, [&](const RowPlace& place) {
    mu_.AssertHeld();
    const SegmentFile* file = FileLocked(place.file_number);
    if (file == nullptr || file->state == SegmentFile::State::kDoomed ||
        !file->index_complete) {
      return true;  // its rows go, or went, all together
    }
    batch.Delete(RowKey(kPartRows, place.file_number, place.page));
    tally(*file).after.Remove(place.page);
    return false;
  });
  for (auto& [number, of] : tallies) {
    SegmentFile& file = *FileLocked(number);
    if (!file.index_complete || file.state == SegmentFile::State::kDoomed) {
      continue;
    }
    FileRow row;
    row.nonce = file.header.nonce;
    row.rows = of.after;
    row.sealed = file.state == SegmentFile::State::kSealed;
    row.next_page = file.next_page;
    // Up to the first record that is not in the index after this batch.
    std::sort(of.put.begin(), of.put.end());
    for (const uint32_t page : file.unsettled) {
      if (std::binary_search(of.put.begin(), of.put.end(), page)) continue;
      row.next_page = page;
      break;
    }
    if (row.sealed) {
      row.entry_count = file.sealed_trailer.entry_count;
      row.entries_checksum = file.sealed_trailer.entries_checksum;
      row.next_page = file.sealed_trailer.footer_page;
    }
    batch.Put(FileRowKey(number), EncodeFileRow(row));
  }
}

// Writes one batch of rows and finishes what it covers. False when there is
// nothing more to do.
bool SegmentLog::CommitOnce() {
  std::vector<Append*> appends;
  std::vector<RowPlace> deletes;
  std::vector<uint32_t> touched;
  absl::btree_map<uint32_t, Tallies> tallies;
  IndexBatch batch;
  {
    absl::MutexLock lock(&mu_);
    if (!std::exchange(commit_wanted_, false) || phase_ != Phase::kOpen) {
      committing_ = false;
      return false;
    }
    appends.swap(synced_);
    deletes.swap(deletes_);
    touched.swap(touched_);
    BuildBatchLocked(appends, tallies, deletes, touched, batch);
  }
  // Not synced: whatever the index forgets in a power cut, recovery finds in
  // the log, and the file rows say how far to trust it.
  const Status written =
      batch.empty() ? absl::OkStatus() : index_.Write(batch, /*sync=*/false);
  Outbox out(*this);
  {
    absl::MutexLock lock(&mu_);
    if (!written.ok()) {
      ++counters_.index_errors;
      deletes_.insert(deletes_.end(), deletes.begin(), deletes.end());
    }
    for (auto& [number, of] : tallies) {
      SegmentFile* file = FileLocked(number);
      if (file == nullptr) continue;
      if (written.ok()) {
        if (file->index_complete) file->rows = of.after;
      } else if (!of.put.empty()) {
        file->index_complete = false;
      }
    }
    for (Append* append : appends) {
      SegmentFile& file = *append->file;
      FinishAppendLocked(append, file.index_complete, out);
    }
  }
  out.Run();
  return true;
}

// --- What is durable becomes visible ---------------------------------------

void SegmentLog::FinishAppendLocked(Append* append, bool has_row, Outbox& out) {
  SegmentFile& file = *append->file;
  file.unsettled.erase(append->frame.page);
  switch (append->frame.kind) {
    case FrameKind::kPart:
      FinishPartLocked(append, has_row, out);
      break;
    case FrameKind::kControl:
      FinishControlLocked(append, out);
      break;
    case FrameKind::kDeaths:
      FinishDeathsLocked(append, out);
      break;
  }
  if (append->is_move) MoveEndedLocked(absl::OkStatus(), out);
  TicketDoneLocked(append->ticket, absl::OkStatus(), out);
  RecycleLocked(append);
  SettledLocked(file, out);
}

void SegmentLog::FinishPartLocked(Append* append, bool has_row, Outbox& out) {
  SegmentFile& file = *append->file;
  const Frame& frame = append->frame;
  Location* location = locations_.Find(append->handle);
  const uint64_t charge = ChargeOf(append->record_pages);
  if (append->is_move) {
    if (location == nullptr || location->state != Location::State::kLive ||
        location->file != append->from_file ||
        location->page != append->from_page) {
      BuryLocked(frame.file_number, frame.page, has_row);  // freed meanwhile
      return;
    }
    location->file = frame.file_number;
    location->page = frame.page;
    file.live_bytes += charge;
    file.locations.push_back(locations_.IndexOf(location));
    BuryLocked(append->from_file, append->from_page, /*has_row=*/true);
    ReduceLiveLocked(append->from_file, charge, out);
    ++counters_.gc_moved_records;
    return;
  }
  if (location->state == Location::State::kCancelled) {
    locations_.Remove(locations_.IndexOf(location));
    BuryLocked(frame.file_number, frame.page, has_row);
    out.Call(std::move(append->done),
             absl::CancelledError("freed while being written"));
    return;
  }
  location->state = Location::State::kLive;
  location->file = frame.file_number;
  location->page = frame.page;
  file.live_bytes += charge;
  file.locations.push_back(locations_.IndexOf(location));
  out.Call(std::move(append->done), absl::OkStatus());
}

void SegmentLog::FinishControlLocked(Append* append, Outbox& out) {
  ControlState& state = controls_[append->control.key];
  const uint64_t charge = ChargeOf(append->record_pages);
  const bool newer = append->control.sequence > state.sequence;
  const bool copy =
      append->is_move && append->control.sequence == state.sequence;
  if (newer || copy) {
    const uint64_t old_charge = state.sequence == 0 ? 0 : ChargeOf(state.pages);
    const uint32_t old_file = state.file;
    append->file->live_bytes += charge;
    state.sequence = append->control.sequence;
    state.file = append->frame.file_number;
    state.page = append->frame.page;
    state.pages = static_cast<uint32_t>(append->record_pages);
    if (newer) state.value = std::move(append->control.value);
    if (old_charge != 0) {
      ReduceLiveLocked(old_file, old_charge, out);
      if (newer) control_bytes_ -= old_charge;
    }
  } else if (!append->is_move) {
    control_bytes_ -= charge;  // a later one was faster
  }
  out.Call(std::move(append->done), absl::OkStatus());
}

void SegmentLog::FinishDeathsLocked(Append* append, Outbox& out) {
  const auto it = death_lists_.find(append->deaths_number);
  if (append->is_move) {
    if (it == death_lists_.end()) return;  // all of its files went meanwhile
    const uint32_t old_file = it->second.file;
    const uint64_t old_charge = ChargeOf(it->second.pages);
    it->second.file = append->frame.file_number;
    it->second.page = append->frame.page;
    it->second.pages = static_cast<uint32_t>(append->record_pages);
    append->file->live_bytes += ChargeOf(append->record_pages);
    ReduceLiveLocked(old_file, old_charge, out);
    return;
  }
  // Files that went while the list was being written need no deaths.
  std::vector<Death> deaths = std::move(append->deaths);
  std::erase_if(deaths, [&](const Death& death) {
    mu_.AssertHeld();
    return FileLocked(death.file_number) == nullptr;
  });
  for (const uint64_t number : append->replaces) {
    const auto replaced = death_lists_.find(number);
    if (replaced == death_lists_.end()) continue;
    const uint32_t old_file = replaced->second.file;
    const uint64_t old_charge = ChargeOf(replaced->second.pages);
    death_lists_.erase(replaced);
    ReduceLiveLocked(old_file, old_charge, out);
  }
  if (deaths.empty()) return;
  append->file->live_bytes += ChargeOf(append->record_pages);
  death_lists_[append->deaths_number] = {
      .file = append->frame.file_number,
      .page = append->frame.page,
      .pages = static_cast<uint32_t>(append->record_pages),
      .deaths = std::move(deaths)};
}

}  // namespace larder
