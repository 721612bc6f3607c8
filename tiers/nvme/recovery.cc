#include "tiers/nvme/recovery.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"

#include "store/checksum.h"
#include "store/record.h"
#include "tiers/nvme/io_queue.h"

namespace larder {
namespace {

constexpr uint64_t kScanBytes = 1_MiB;

uint64_t PlaceKey(uint32_t file, uint32_t page) {
  return uint64_t{file} << 32 | page;
}

// What makes two records the same part.
Checksum IdentityOf(const RecordMeta& meta) {
  std::array<std::byte, 96> bytes{};
  std::byte* at = bytes.data();
  const auto put = [&at](const auto& value) {
    std::memcpy(at, &value, sizeof value);
    at += sizeof value;
  };
  put(meta.space.bytes);
  put(meta.chunk.bytes);
  put(Raw(meta.tenant));
  put(Raw(meta.group));
  put(meta.shape);
  return ComputeChecksum(bytes);
}

uint32_t EndOf(const Frame& frame) {
  return frame.page + static_cast<uint32_t>(frame.pages());
}

}  // namespace

void Recovery::Note(const std::string& text) {
  if (report_.note.size() > 400) return;
  if (!report_.note.empty()) report_.note += "; ";
  report_.note += text;
}

StatusOr<DurableTier::RecoveryReport> Recovery::Run(DurableTier::Found& found) {
  LARDER_RETURN_IF_ERROR(OpenIndex());
  LARDER_RETURN_IF_ERROR(FindFiles());
  LARDER_RETURN_IF_ERROR(ReadFileRows());
  LARDER_RETURN_IF_ERROR(CountRows());
  for (auto& [number, file] : files_) {
    if (!file.trusted) {
      LoadSealed(file);
      if (!file.frames.empty()) report_.rebuilt_from_footers = true;
    } else if (!file.sealed) {
      Scan(file, file.row.next_page);
      std::erase_if(file.frames,
                    [&ahead = file.rows_ahead](const Frame& frame) {
                      return ahead.contains(frame.page);
                    });
    }
    if (!file.sealed) {
      // What is reported as durable must be.
      const Status synced = Sync(io_, file.id);
      if (!synced.ok()) Note(std::string(synced.message()));
    }
    ReadSmallOf(file);
  }
  report_.rebuilt_from_footers |= index_was_reset_ && !files_.empty();
  LARDER_RETURN_IF_ERROR(Resolve());
  AdoptFiles();
  DropStrayRows();
  size_t next = 0;
  LARDER_RETURN_IF_ERROR(ForEachPart([&](const Frame& frame, bool has_row) {
    if (FoundFile& file = files_.at(frame.file_number); !file.sealed) {
      file.footer.push_back(frame);
    }
    const bool dead = IsDead(frame);
    const bool wins = !dead && next < candidates_.size() &&
                      candidates_[next].file == frame.file_number &&
                      candidates_[next].page == frame.page &&
                      candidates_[next].wins;
    if (!dead) ++next;
    if (wins) {
      ++report_.records;
      found(frame.meta, log_.AdoptPart(frame));
    } else {
      log_.AdoptDead(frame.file_number, frame.page, /*is_listed=*/dead);
    }
  }));
  FinishFiles();
  log_.SetNext(max_sequence_ + 1, max_file_number_ + 1);
  return report_;
}

// --- Index and files -------------------------------------------------------

Status Recovery::OpenIndex() {
  const Status opened = index_.Open();
  if (opened.ok()) return opened;
  if (!absl::IsDataLoss(opened) && !absl::IsUnavailable(opened)) return opened;
  Note(absl::StrCat("index rebuilt (", opened.message(), ")"));
  index_was_reset_ = true;
  return Annotate(index_.Reset(), "make a new index");
}

Status Recovery::FindFiles() {
  LARDER_ASSIGN_OR_RETURN(const std::vector<FileIo::FileInfo> all, io_.List());
  for (const FileIo::FileInfo& info : all) {
    if (SegmentFileNumber(info.name) == 0) continue;
    LARDER_RETURN_IF_ERROR(OpenFile(info.name, info.bytes));
  }
  return absl::OkStatus();
}

Status Recovery::OpenFile(const std::string& name, uint64_t bytes) {
  const uint32_t number = SegmentFileNumber(name);
  max_file_number_ = std::max(max_file_number_, number);
  LARDER_ASSIGN_OR_RETURN(const FileId id, io_.Open(name));
  FoundFile file;
  file.id = id;
  Status status = bytes < kPageBytes
                      ? absl::DataLossError("shorter than its header")
                      : ReadHeader(id, number, file.header);
  if (absl::IsFailedPrecondition(status)) {
    io_.Close(id);
    return Annotate(status, name);
  }
  if (status.ok() && file.header.file_bytes > options_.segment_file_bytes) {
    io_.Close(id);
    return absl::FailedPreconditionError(absl::StrCat(
        name, " was made with segment_file_bytes = ", file.header.file_bytes,
        ", more than the ", options_.segment_file_bytes,
        " configured now (give at least that, or another data directory)"));
  }
  if (!status.ok()) {
    // A file that was being made when the power went, or one whose header is
    // gone: the index may still know its nonce (ReadFileRows).
    file.header = {.file_number = 0, .file_bytes = bytes & ~(kPageBytes - 1)};
    file.may_delete = absl::IsDataLoss(status);
    Note(absl::StrCat(name, ": ", status.message()));
  } else if (bytes < file.header.file_bytes) {
    file.header.file_bytes = bytes & ~(kPageBytes - 1);
    Note(absl::StrCat(name, " was cut short"));
  }
  files_[number] = std::move(file);
  return absl::OkStatus();
}

// DataLoss only if the page was read, more than once, and is no header.
Status Recovery::ReadHeader(FileId id, uint32_t number, FileHeader& header) {
  const PageMemory page(kPageBytes);
  Status status;
  for (int attempt = 0; attempt < 3; ++attempt) {
    status = ReadPatiently(io_, id, 0, page.span());
    if (!status.ok()) return absl::UnavailableError(status.message());
    const StatusOr<FileHeader> decoded = DecodeFileHeader(page.span());
    status = decoded.status();
    if (decoded.ok() && decoded->file_number != number) {
      status = absl::DataLossError("the header of another file");
    }
    if (!status.ok()) continue;
    header = *decoded;
    return status;
  }
  return status;
}

// Reads what the index says of each file, and sees which files agree.
Status Recovery::ReadFileRows() {
  Status damaged;
  const auto visit = [&](absl::string_view key, absl::string_view value) {
    const StatusOr<uint32_t> number = DecodeFileRowKey(key);
    const StatusOr<FileRow> row = DecodeFileRow(value);
    if (!number.ok() || !row.ok()) {
      damaged = absl::DataLossError("file rows");
      return false;
    }
    file_rows_[*number] = *row;
    return true;
  };
  Status scanned = index_.Scan(absl::string_view(&kFileRows, 1), visit);
  if (scanned.ok()) scanned = damaged;
  if (!scanned.ok()) {
    Note(absl::StrCat("index rebuilt (", scanned.message(), ")"));
    file_rows_.clear();
    index_was_reset_ = true;
    LARDER_RETURN_IF_ERROR(Annotate(index_.Reset(), "make a new index"));
  }
  for (const auto& [number, row] : file_rows_) {
    max_file_number_ = std::max(max_file_number_, number);
    if (!files_.contains(number)) stray_rows_.insert(number);
  }
  for (auto it = files_.begin(); it != files_.end();) {
    FoundFile& file = it->second;
    const auto row = file_rows_.find(it->first);
    if (file.header.file_number == 0 && row != file_rows_.end() &&
        file.header.file_bytes >= 4 * kPageBytes) {
      file.header.file_number = it->first;
      file.header.nonce = row->second.nonce;
      // Write it again, for the day when the index is gone.
      const PageMemory header(kPageBytes);
      EncodeFileHeader(file.header, header.span().first<kPageBytes>());
      const Status written = WriteAll(io_, file.id, 0, header.span());
      if (!written.ok()) Note(std::string(written.message()));
    }
    if (file.header.file_number == 0) {
      io_.Close(file.id);
      if (file.may_delete) {
        const Status deleted = io_.Delete(SegmentFileName(it->first));
        if (!deleted.ok()) Note(std::string(deleted.message()));
      }
      it = files_.erase(it);
      continue;
    }
    if (row != file_rows_.end() && row->second.nonce == file.header.nonce &&
        row->second.next_page >= 1 &&
        row->second.next_page <= file.header.file_bytes / kPageBytes) {
      file.row = row->second;
      file.has_row = true;
      file.trusted = true;
    }
    const PageMemory page(kPageBytes);
    if (ReadPatiently(io_, file.id, file.header.file_bytes - kPageBytes,
                      page.span())
            .ok()) {
      const StatusOr<Trailer> trailer = DecodeTrailer(page.span(), file.header);
      if (trailer.ok()) {
        file.sealed = true;
        file.trailer = *trailer;
        file.next_page = trailer->footer_page;
      }
    }
    if (file.trusted && file.row.sealed != file.sealed) {
      if (file.row.sealed) {
        // The trailer rotted; what it said is known, and the rows are whole.
        file.sealed = true;
        file.trailer = {.file_number = file.header.file_number,
                        .footer_page = file.row.next_page,
                        .entry_count = file.row.entry_count,
                        .entries_checksum = file.row.entries_checksum};
      } else {
        file.trusted = false;  // sealed after the index last heard of it
      }
    } else if (file.trusted && file.sealed &&
               (file.trailer.entries_checksum != file.row.entries_checksum ||
                file.trailer.entry_count != file.row.entry_count)) {
      file.trusted = false;
    }
    if (file.trusted) file.next_page = file.row.next_page;
    ++it;
  }
  return absl::OkStatus();
}

void Recovery::Distrust(FoundFile& file) {
  if (file.trusted) {
    Note(absl::StrCat("the index disagrees with ",
                      SegmentFileName(file.header.file_number)));
  }
  file.trusted = false;
  file.next_page = 1;
}

// Adds up the rows of every file, to see that none was lost.
Status Recovery::CountRows() {
  for (const char kind : {kPartRows, kControlRows}) {
    const auto visit = [&](absl::string_view key, absl::string_view value) {
      const StatusOr<RowPlace> place = DecodeRowKey(key);
      if (!place.ok()) return true;  // belongs to nothing; goes with Reset
      const auto it = files_.find(place->file_number);
      if (it == files_.end()) {
        stray_rows_.insert(place->file_number);
        max_file_number_ = std::max(max_file_number_, place->file_number);
        return true;
      }
      it->second.counted.Add(place->page);
      if (it->second.trusted && place->page >= it->second.row.next_page) {
        it->second.rows_ahead.insert(place->page);
      }
      if (kind == kControlRows && it->second.trusted) {
        Frame frame;
        frame.kind = FrameKind::kControl;
        frame.file_number = place->file_number;
        frame.page = place->page;
        frame.payload_bytes = value.size();
        CollectSmall(
            it->second, frame,
            {reinterpret_cast<const std::byte*>(value.data()), value.size()},
            /*has_row=*/true);
      }
      return true;
    };
    const Status scanned = index_.Scan(absl::string_view(&kind, 1), visit);
    if (absl::IsDataLoss(scanned)) {
      Note(absl::StrCat("index rebuilt (", scanned.message(), ")"));
      index_was_reset_ = true;
      LARDER_RETURN_IF_ERROR(Annotate(index_.Reset(), "make a new index"));
      for (auto& [number, file] : files_) {
        Distrust(file);
        file.counted = {};
      }
      stray_rows_.clear();
      small_.clear();
      dead_.clear();
      return absl::OkStatus();
    }
    LARDER_RETURN_IF_ERROR(scanned);
  }
  for (auto& [number, file] : files_) {
    if (!file.trusted || file.counted == file.row.rows) continue;
    Distrust(file);
    const uint32_t of = number;
    std::erase_if(small_, [of](const Small& small) {
      return small.frame.file_number == of;
    });
  }
  return absl::OkStatus();
}

// --- What files say themselves ---------------------------------------------

void Recovery::LoadSealed(FoundFile& file) {
  if (file.sealed && LoadFooter(file)) return;
  // No footer, or a damaged one. Frames alone prove nothing then, not even in a
  // file that was sealed once: the footer left out those whose records were
  // torn or failed.
  Scan(file, 1);
  file.sealed = false;
}

bool Recovery::LoadFooter(FoundFile& file) {
  const PageMemory memory(file.trailer.entries_bytes());
  const ByteSpan entries = memory.span().first(file.trailer.entries_bytes());
  if (!ReadPatiently(io_, file.id,
                     uint64_t{file.trailer.footer_page} * kPageBytes,
                     memory.span())
           .ok() ||
      FooterChecksum(entries, file.header.nonce) !=
          file.trailer.entries_checksum) {
    return false;
  }
  StatusOr<std::vector<Frame>> frames = DecodeFooter(entries, file.trailer);
  if (!frames.ok()) return false;
  file.frames = *std::move(frames);
  file.next_page = file.trailer.footer_page;
  return true;
}

void Recovery::Scan(FoundFile& file, uint32_t from) {
  const uint64_t pages = file.header.file_bytes / kPageBytes;
  const PageMemory memory(kScanBytes);
  PageMemory payload_memory;
  uint64_t begin = 0;  // pages [begin, end) are in memory
  uint64_t end = 0;
  for (uint64_t page = from; page < pages;) {
    if (page < begin || page >= end) {
      begin = page;
      end = std::min(pages, page + kScanBytes / kPageBytes);
      if (!ReadPatiently(io_, file.id, begin * kPageBytes,
                         memory.span().first((end - begin) * kPageBytes))
               .ok()) {
        // Find out which of the pages cannot be read.
        end = begin + 1;
        if (!ReadPatiently(io_, file.id, begin * kPageBytes,
                           memory.span().first(kPageBytes))
                 .ok()) {
          ++page;
          continue;
        }
      }
    }
    const StatusOr<Frame> frame = DecodeFrame(
        memory.span().subspan((page - begin) * kPageBytes, kPageBytes),
        file.header, static_cast<uint32_t>(page));
    if (!frame.ok()) {
      ++page;
      continue;
    }
    ByteSpan payload;
    Status status = ReadPayload(file, *frame, payload_memory, payload);
    if (status.ok() && frame->kind == FrameKind::kPart) {
      const StatusOr<RecordView> view = RecordView::Parse(payload);
      status = view.ok() ? view->VerifyPayload() : view.status();
      if (status.ok() && view->meta() != frame->meta) {
        status = absl::DataLossError("frame and record disagree");
      }
    }
    if (!status.ok()) {
      ++report_.dropped_records;
      ++page;
      continue;
    }
    page = EndOf(*frame);
    file.next_page = std::max(file.next_page, EndOf(*frame));
    file.frames.push_back(*frame);
  }
}

// Reads a record; checks the checksum that is in the frame, if it is there.
Status Recovery::ReadPayload(const FoundFile& file, const Frame& frame,
                             PageMemory& memory, ByteSpan& payload) {
  const uint64_t bytes = RoundUp(frame.payload_bytes, kPageBytes);
  if (memory.size() < bytes) memory = PageMemory(bytes);
  LARDER_RETURN_IF_ERROR(ReadPatiently(io_, file.id,
                                       (uint64_t{frame.page} + 1) * kPageBytes,
                                       memory.span().first(bytes)));
  payload = memory.span().first(frame.payload_bytes);
  if (frame.kind != FrameKind::kPart &&
      ComputeChecksum(payload) != frame.payload_checksum) {
    return absl::DataLossError("payload checksum");
  }
  return absl::OkStatus();
}

// Takes up a control or a list of deaths. What does not parse is left out.
void Recovery::CollectSmall(FoundFile& file, const Frame& frame,
                            ByteSpan payload, bool has_row) {
  Small small;
  small.frame = frame;
  small.has_row = has_row;
  if (!has_row) {
    small.payload.assign(reinterpret_cast<const char*>(payload.data()),
                         payload.size());
  }
  if (StatusOr<ControlRecord> control = DecodeControl(payload); control.ok()) {
    small.frame.kind = FrameKind::kControl;
    small.control = *std::move(control);
    max_sequence_ = std::max(max_sequence_, small.control.sequence);
  } else if (StatusOr<std::vector<Death>> deaths = DecodeDeaths(payload);
             deaths.ok()) {
    small.frame.kind = FrameKind::kDeaths;
    small.deaths = *std::move(deaths);
  } else {
    Note(absl::StrCat("a damaged control in ",
                      SegmentFileName(file.header.file_number)));
    return;
  }
  small_.push_back(std::move(small));
}

// The controls and lists of deaths among the frames read from a file.
void Recovery::ReadSmallOf(FoundFile& file) {
  PageMemory memory;
  const PageMemory page(kPageBytes);
  for (Frame& frame : file.frames) {
    max_sequence_ = std::max(max_sequence_, frame.sequence);
    if (frame.kind == FrameKind::kPart) continue;
    // A footer entry has no checksum of the payload: the frame has.
    ByteSpan payload;
    Status status = ReadPatiently(
        io_, file.id, uint64_t{frame.page} * kPageBytes, page.span());
    if (status.ok()) {
      const StatusOr<Frame> whole =
          DecodeFrame(page.span(), file.header, frame.page);
      status = whole.status();
      if (whole.ok()) frame = *whole;
    }
    if (status.ok()) status = ReadPayload(file, frame, memory, payload);
    if (status.ok()) {
      CollectSmall(file, frame, payload, /*has_row=*/false);
    } else {
      Note(absl::StrCat("a damaged control in ",
                        SegmentFileName(file.header.file_number)));
    }
  }
}

// --- Which copies live -----------------------------------------------------

bool Recovery::IsDead(const Frame& frame) const {
  return dead_.contains(PlaceKey(frame.file_number, frame.page));
}

Status Recovery::ForEachPart(
    absl::FunctionRef<void(const Frame& frame, bool has_row)> visit) {
  const auto visit_row = [&](absl::string_view key, absl::string_view value) {
    const StatusOr<RowPlace> place = DecodeRowKey(key);
    if (!place.ok()) return true;
    const auto it = files_.find(place->file_number);
    if (it == files_.end() || !it->second.trusted) return true;
    Frame frame;
    if (!DecodePartRow(value, frame).ok()) return true;
    frame.file_number = place->file_number;
    frame.page = place->page;
    if (frame.page == 0 ||
        EndOf(frame) > it->second.header.file_bytes / kPageBytes) {
      return true;
    }
    visit(frame, /*has_row=*/true);
    return true;
  };
  LARDER_RETURN_IF_ERROR(
      index_.Scan(absl::string_view(&kPartRows, 1), visit_row));
  for (const auto& [number, file] : files_) {
    for (const Frame& frame : file.frames) {
      if (frame.kind == FrameKind::kPart) visit(frame, /*has_row=*/false);
    }
  }
  return absl::OkStatus();
}

Status Recovery::Resolve() {
  for (Small& small : small_) {
    for (const Death& death : small.deaths) {
      max_file_number_ = std::max(max_file_number_, death.file_number);
      const auto it = files_.find(death.file_number);
      if (it != files_.end() &&
          NoncePrefix(it->second.header.nonce) == death.nonce_prefix) {
        dead_.insert(PlaceKey(death.file_number, death.page));
      }
    }
    std::erase_if(small.deaths, [&](const Death& death) {
      return !dead_.contains(PlaceKey(death.file_number, death.page));
    });
  }
  LARDER_RETURN_IF_ERROR(ForEachPart([&](const Frame& frame, bool has_row) {
    max_sequence_ = std::max(max_sequence_, frame.sequence);
    if (IsDead(frame)) return;
    candidates_.push_back({IdentityOf(frame.meta), frame.meta.generation,
                           frame.sequence, frame.file_number, frame.page,
                           false});
  }));
  struct Hash {
    size_t operator()(const Checksum& sum) const { return sum.low; }
  };
  absl::flat_hash_map<Checksum, uint32_t, Hash> winners;
  winners.reserve(candidates_.size());
  for (uint32_t i = 0; i < candidates_.size(); ++i) {
    Candidate& candidate = candidates_[i];
    const auto [it, first] = winners.try_emplace(candidate.identity, i);
    if (!first) {
      Candidate& other = candidates_[it->second];
      if (std::tie(candidate.generation, candidate.sequence) <=
          std::tie(other.generation, other.sequence)) {
        continue;
      }
      other.wins = false;
      it->second = i;
    }
    candidate.wins = true;
  }
  return absl::OkStatus();
}

// --- Telling log and index -------------------------------------------------

void Recovery::AdoptFiles() {
  for (auto& [number, file] : files_) {
    file.rows = file.trusted ? file.row.rows : RowDigest{};
    for (const Frame& frame : file.frames) {
      if (frame.kind == FrameKind::kPart) file.rows.Add(frame.page);
    }
  }
  for (const Small& small : small_) {
    FoundFile& file = files_.at(small.frame.file_number);
    if (!small.has_row) file.rows.Add(small.frame.page);
    if (!file.sealed) file.footer.push_back(small.frame);
  }
  for (const auto& [number, file] : files_) {
    log_.AdoptFile({.header = file.header,
                    .id = file.id,
                    .sealed = file.sealed,
                    .next_page = file.next_page,
                    .trailer = file.trailer,
                    .rows = file.rows});
  }
  for (const Small& small : small_) {
    if (small.frame.kind == FrameKind::kControl) {
      log_.AdoptControl(small.frame, small.control);
    } else {
      log_.AdoptDeaths(small.frame, small.deaths);
    }
  }
}

// Gives the index the rows that it lacks, and the log the footers it will
// write for files that have none.
void Recovery::FinishFiles() {
  std::map<uint32_t, IndexBatch> batches;
  for (const Small& small : small_) {
    if (small.has_row) continue;
    const uint32_t number = small.frame.file_number;
    batches[number].Put(RowKey(kControlRows, number, small.frame.page),
                        small.payload);
  }
  for (auto& [number, file] : files_) {
    if (!file.trusted || !file.sealed) {
      IndexBatch batch;
      if (!file.trusted) {
        batch.DeletePrefix(RowPrefix(kPartRows, number));
        batch.DeletePrefix(RowPrefix(kControlRows, number));
      }
      for (const IndexBatch::Change& change : batches[number].changes()) {
        batch.Put(change.key, change.value);
      }
      for (const Frame& frame : file.frames) {
        if (frame.kind != FrameKind::kPart) continue;
        batch.Put(RowKey(kPartRows, number, frame.page),
                  EncodePartRow(frame.sequence, frame.meta));
      }
      FileRow row;
      row.nonce = file.header.nonce;
      row.rows = file.rows;
      row.sealed = file.sealed;
      row.next_page = file.next_page;
      row.entry_count = file.trailer.entry_count;
      row.entries_checksum = file.trailer.entries_checksum;
      batch.Put(FileRowKey(number), EncodeFileRow(row));
      const Status written = index_.Write(batch, /*sync=*/false);
      if (!written.ok()) {
        Note(std::string(written.message()));
        log_.AdoptIndexError(number);
      }
    }
    if (file.sealed) continue;
    std::sort(file.footer.begin(), file.footer.end(),
              [](const Frame& a, const Frame& b) { return a.page < b.page; });
    std::vector<std::byte> footer(file.footer.size() * kFooterEntryBytes);
    for (size_t i = 0; i < file.footer.size(); ++i) {
      EncodeFooterEntry(
          file.footer[i],
          std::span<std::byte, kFooterEntryBytes>(
              footer.data() + i * kFooterEntryBytes, kFooterEntryBytes));
    }
    log_.AdoptFooter(number, std::move(footer));
  }
}

void Recovery::DropStrayRows() {
  IndexBatch batch;
  for (const uint32_t number : stray_rows_) {
    batch.Delete(FileRowKey(number));
    batch.DeletePrefix(RowPrefix(kPartRows, number));
    batch.DeletePrefix(RowPrefix(kControlRows, number));
  }
  // Rows of no file are ignored by the next recovery as well.
  if (!batch.empty()) (void)index_.Write(batch, /*sync=*/false);
}

}  // namespace larder
