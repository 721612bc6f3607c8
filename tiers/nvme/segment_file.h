#ifndef LARDER_TIERS_NVME_SEGMENT_FILE_H_
#define LARDER_TIERS_NVME_SEGMENT_FILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/time/time.h"

#include "store/file_io.h"
#include "tiers/nvme/log_format.h"

namespace larder {

struct Append;

// How much a record of so many pages takes of a segment file: its frame, its
// pages, and its entry in the footer.
constexpr uint64_t ChargeOf(uint64_t pages) {
  return (1 + pages) * kPageBytes + kFooterEntryBytes;
}

// "seg-00000042.log", and back; 0 if it is no such name.
std::string SegmentFileName(uint32_t number);
uint32_t SegmentFileNumber(const std::string& name);

// A name for the rows of one file in the index: what their keys add up to. A
// row lost or added changes it, so that a damaged index is noticed.
struct RowDigest {
  uint64_t rows = 0;
  uint64_t mix = 0;
  void Add(uint32_t page);
  void Remove(uint32_t page);
  bool operator==(const RowDigest&) const = default;
};

// One file of the log. Everything is guarded by the mutex of the SegmentLog.
struct SegmentFile {
  enum class State : uint8_t {
    kOpen,       // a head of the log: records are appended
    kFull,       // no more appends; sealed once the last one is settled
    kSealed,     // has a footer
    kCondemned,  // a write or sync failed: no footer, emptied first
    kDoomed,     // nothing lives in it: deleted when nobody reads it
  };

  FileHeader header;
  FileId id = FileId::kNone;
  State state = State::kOpen;
  uint32_t next_page = 1;   // where the next record goes
  uint64_t live_bytes = 0;  // charges of what lives here
  uint32_t reads = 0;       // under way
  uint32_t moves = 0;       // steps of garbage collection at work on it
  bool sealing = false;     // taken by the housekeeper
  absl::Time retry_at = absl::InfinitePast();  // of a deletion that failed
  Status condemned;                            // why it is
  Trailer sealed_trailer;                      // once it is sealed

  // Records that may live here, by index in the location table, and controls.
  std::vector<uint32_t> locations;
  struct ControlPlace {
    uint32_t page;
    uint32_t pages;
    FrameKind kind;
    std::string key;      // of a control
    uint64_t deaths = 0;  // of a list of deaths: its number
  };
  std::vector<ControlPlace> controls;

  // Until it is sealed: the footer to be, and what is not settled yet.
  std::vector<std::byte> footer;
  absl::btree_set<uint32_t> unsettled;  // pages of appends under way
  std::vector<Append*> written;         // waiting for a sync
  uint64_t written_bytes = 0;
  absl::Time first_written;

  // What the index holds about it. Once a row could not be written, the file's
  // rows are left as they are, and recovery reads the file.
  RowDigest rows;
  bool index_complete = true;

  uint64_t pages() const { return header.file_bytes / kPageBytes; }
  uint64_t entry_count() const { return footer.size() / kFooterEntryBytes; }
  // What all records of a file of this size can be charged together.
  static uint64_t UsableBytes(uint64_t file_bytes) {
    return file_bytes - 3 * kPageBytes;  // header, trailer, rounding
  }
  bool Fits(uint64_t record_pages) const;
};

}  // namespace larder

#endif  // LARDER_TIERS_NVME_SEGMENT_FILE_H_
