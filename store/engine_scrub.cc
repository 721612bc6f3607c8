#include <algorithm>
#include <cstdlib>
#include <utility>

#include "store/engine_impl.h"

namespace larder {
namespace {

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

Status CheckStoredRecord(const ExpectedRecord& expected, ByteSpan memory,
                         bool payload, RecordMeta* meta) {
  return CheckStoredPlanes(expected, memory, 0, payload ? kPlanesMax : 0, meta);
}

StatusOr<RecordView> ParseStoredRecord(const ExpectedRecord& expected,
                                       ByteSpan memory) {
  if (memory.size() < expected.record_bytes) {
    return absl::DataLossError("the copy is too short");
  }
  StatusOr<RecordView> view =
      RecordView::Parse(memory.first(expected.record_bytes));
  if (!view.ok()) {
    return absl::DataLossError(view.status().message());
  }
  const RecordMeta& found = view->meta();
  if (found.checksum != expected.checksum || found.tenant != expected.tenant ||
      found.space != expected.space || found.chunk != expected.chunk ||
      found.group != expected.group || found.shape != expected.shape ||
      found.record_bytes != expected.record_bytes) {
    return absl::DataLossError("the copy is of another record");
  }
  return view;
}

Status CheckStoredPlanes(const ExpectedRecord& expected, ByteSpan memory,
                         uint8_t from, uint8_t to, RecordMeta* meta) {
  LARDER_ASSIGN_OR_RETURN(const RecordView view,
                          ParseStoredRecord(expected, memory));
  if (meta != nullptr) *meta = view.meta();
  return view.VerifyPayload(from, to);
}

// A consumer says that what it reads in memory is bad.
void EngineImpl::CheckReported(ChunkIndex index, std::vector<WriteJob> parts) {
  std::vector<uint32_t> bad;
  for (const WriteJob& part : parts) {
    if (!CheckStoredRecord(part.expected, dram_.Map(part.dram), true).ok()) {
      bad.push_back(part.version);
    }
  }
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  chunks_[index].checking = false;
  for (const uint32_t version : bad) {
    const PartEntry* part = chunks_.FindPart(index, version);
    const auto checked = std::find_if(
        parts.begin(), parts.end(),
        [version](const WriteJob& p) { return p.version == version; });
    if (part != nullptr && part->dram() == checked->dram) {
      DropCorrupt(index, version, Level::kDram, after);
    }
  }
  Unbusy(index, after);
}

// ---- Verification of a whole tier: one part at a time ----

struct EngineImpl::Scan {
  Level level{};
  absl::AnyInvocable<bool(const VerifyProgress&)> tell;
  VerifyProgress progress;
  uint32_t next = 0;  // slot
  // Of the chunk that is being read; it is kept busy.
  ChunkIndex chunk = kNoChunk;
  std::vector<WriteJob> parts;  // `dram` is the extent in the tier
  // Of the part that is being read from a tier below DRAM.
  std::unique_ptr<std::byte, FreeDeleter> buffer;
  size_t reads_left = 0;
  Status read_status;
};

void EngineImpl::Verify(
    TierKind tier, absl::AnyInvocable<bool(const VerifyProgress&)> progress) {
  auto scan = std::make_shared<Scan>();
  const std::optional<Level> level = LevelOf(tier);
  scan->tell = std::move(progress);
  if (!level.has_value()) {
    scan->progress.finished = true;
    scan->progress.status = absl::NotFoundError("there is no such tier");
    scan->tell(scan->progress);
    return;
  }
  scan->level = *level;
  Post([this, scan] { CountForScan(scan, 0); });
}

void EngineImpl::CountForScan(std::shared_ptr<Scan> scan, uint32_t from) {
  constexpr uint32_t kPiece = 4096;
  uint32_t end;
  {
    absl::MutexLock lock(&mu_);
    end = std::min(chunks_.slots(), from + kPiece);
    for (uint32_t i = from; i < end; ++i) {
      bool any = false;
      for (const PartEntry& part : chunks_.Parts(ChunkIndex{i})) {
        if (!chunks_[ChunkIndex{i}].live ||
            (part.copies() & Bit(scan->level)) == 0) {
          continue;
        }
        any = true;
        scan->progress.bytes_total +=
            chunks_.Facts(ChunkIndex{i}, part, scan->level).record_bytes;
      }
      scan->progress.chunks_total += any ? 1 : 0;
    }
    if (end == chunks_.slots()) end = 0;
  }
  Post([this, scan, end] {
    if (end == 0) {
      ScanNext(scan);
    } else {
      CountForScan(scan, end);
    }
  });
}

// The next chunk with copies in the tier; false at the end.
bool EngineImpl::PickForScan(Scan& scan) {
  for (; scan.next < chunks_.slots(); ++scan.next) {
    const ChunkIndex index{scan.next};
    if (!chunks_[index].live) continue;
    for (const PartEntry& part : chunks_.Parts(index)) {
      const Extent extent = chunks_.Copy(index, part, scan.level);
      if (extent) {
        scan.parts.push_back(
            {index, part.version, extent,
             Expect(index, part, chunks_.Facts(index, part, scan.level)),
             nullptr});
      }
    }
    if (scan.parts.empty()) continue;
    scan.chunk = index;
    ++chunks_[index].busy;
    ++scan.next;
    return true;
  }
  return false;
}

void EngineImpl::ScanNext(std::shared_ptr<Scan> scan) {
  bool more = false;
  {
    absl::MutexLock lock(&mu_);
    more = PickForScan(*scan);
  }
  if (more) {
    ScanPart(std::move(scan));
    return;
  }
  scan->progress.finished = true;
  scan->tell(scan->progress);
}

void EngineImpl::ScanPart(std::shared_ptr<Scan> scan) {
  const WriteJob& part = scan->parts.back();
  if (scan->level == Level::kDram) {
    EndScanPart(scan,
                CheckStoredRecord(part.expected, dram_.Map(part.dram), true));
    return;
  }
  const uint64_t bytes = RoundUp(part.expected.record_bytes, kPageBytes);
  scan->buffer.reset(
      static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes)));
  if (scan->buffer == nullptr) {
    EndScanPart(scan, absl::ResourceExhaustedError("no memory to read into"));
    return;
  }
  const uint64_t piece = options_.promote_io_bytes;
  {
    absl::MutexLock lock(&mu_);
    scan->reads_left = (bytes + piece - 1) / piece;
    scan->read_status = absl::OkStatus();
  }
  const Extent extent = part.dram;
  const MutableByteSpan memory(scan->buffer.get(), bytes);
  for (uint64_t at = 0; at < bytes; at += piece) {
    tiers_[Raw(scan->level)]->Read(
        extent, at, memory.subspan(at, std::min(piece, bytes - at)),
        Guard([this, scan](Status status) {
          OnScanRead(scan, std::move(status));
        }));
  }
}

void EngineImpl::OnScanRead(std::shared_ptr<Scan> scan, Status status) {
  {
    absl::MutexLock lock(&mu_);
    scan->read_status.Update(status);
    if (--scan->reads_left > 0) return;
  }
  Post([this, scan] {
    Status checked = scan->read_status;
    const ExpectedRecord& expected = scan->parts.back().expected;
    if (checked.ok()) {
      checked = CheckStoredRecord(
          expected, ByteSpan(scan->buffer.get(), expected.record_bytes), true);
    }
    EndScanPart(scan, checked);
  });
}

void EngineImpl::EndScanPart(std::shared_ptr<Scan> scan, const Status& status) {
  const WriteJob part = std::move(scan->parts.back());
  scan->parts.pop_back();
  scan->buffer.reset();
  const bool last = scan->parts.empty();
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    const PartEntry* entry = chunks_.FindPart(part.chunk, part.version);
    const bool same =
        chunks_[part.chunk].live && entry != nullptr &&
        chunks_.Copy(part.chunk, *entry, scan->level) == part.dram;
    if (absl::IsDataLoss(status) && same) {
      ++scan->progress.corrupt;
      DropCorrupt(part.chunk, part.version, scan->level, after);
    }
    if (last) Unbusy(scan->chunk, after);
  }
  scan->progress.bytes_done += part.expected.record_bytes;
  if (last) {
    ++scan->progress.chunks_done;
    if (!scan->tell(scan->progress)) return;
  }
  Post([this, scan, last] {
    if (last) {
      ScanNext(scan);
    } else {
      ScanPart(scan);
    }
  });
}

}  // namespace larder
